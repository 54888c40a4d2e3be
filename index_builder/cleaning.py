"""Which captions enter the datastore: normal form, length filters, duplicates. No storage, no Ray."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from index_builder.dump_formats import DumpRow
from smallcap.config import CleaningConfig
from smallcap.prompt import encode_texts, load_tokenizer

RULES_VERSION = 1
"""Part of a manifest's `filters`; raised when the same dump and options would clean to something else."""

KEY_BYTES = 16


@dataclass(frozen=True)
class CleanRow:
    """A caption that passed the filters.

    Attributes:
        key: What duplicates have in common; see `caption_key`.
        text: With surrounding and repeated white space removed.
        image_id: Of the image it was written for, if known.
    """

    key: bytes
    text: str
    image_id: str | None


@dataclass
class UniqueCaption:
    """A caption with all its duplicates."""

    key: bytes
    text: str
    source: int
    image_ids: dict[str, None]  # a set that keeps its order


def caption_key(text: str) -> bytes:
    """Returns blake2b-128 of the text after NFKC, case folding and collapsing of white space."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return blake2b(folded.encode(), digest_size=KEY_BYTES).digest()


class Cleaner:
    """Applies the filters to rows of a dump.

    Args:
        config: The filters; its tokenizer is loaded here.
    """

    def __init__(self, config: CleaningConfig) -> None:
        self._config = config
        self._tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)

    def clean(self, rows: Iterable[DumpRow]) -> tuple[list[CleanRow], Counter[str]]:
        """Returns the rows that pass, in order, and the number dropped for each reason."""
        dropped: Counter[str] = Counter()
        candidates: list[tuple[str, str | None]] = []
        for row in rows:
            text = " ".join(row.text.split())
            image_id = (row.image_id or "").strip() or None
            reason = row.problem or self._reason(text, image_id)
            if reason:
                dropped[reason] += 1
            else:
                candidates.append((text, image_id))
        kept = []
        lengths = self._lengths([text for text, _ in candidates])
        for (text, image_id), length in zip(candidates, lengths, strict=True):
            if length > self._config.max_tokens:
                dropped["too_long"] += 1
            else:
                kept.append(CleanRow(caption_key(text), text, image_id))
        return kept, dropped

    def _reason(self, text: str, image_id: str | None) -> str:
        if not text:
            return "empty"
        try:
            f"{text}{image_id}".encode()
        except UnicodeEncodeError:  # JSON can hold half a surrogate pair, which is no text
            return "malformed"
        return "too_few_words" if text.count(" ") + 1 < self._config.min_words else ""

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Returns each text's tokens, or its words where there is no tokenizer."""
        if self._tokenizer is None:
            return [text.count(" ") + 1 for text in texts]
        return [len(ids) for ids in encode_texts(self._tokenizer, texts)]


class Deduplicator:
    """Joins captions with equal keys: the first one's text and source, every image's id.

    Rows must come in the order of (source, row), which makes the result the same however the work was scheduled.
    """

    def __init__(self) -> None:
        self._unique: dict[bytes, UniqueCaption] = {}
        self.duplicates = 0

    def add(self, key: bytes, text: str, source: int, image_id: str | None) -> None:
        """Adds one row."""
        known = self._unique.get(key)
        if known is None:
            known = self._unique[key] = UniqueCaption(key, text, source, {})
        else:
            self.duplicates += 1
        if image_id is not None:
            known.image_ids[image_id] = None

    def captions(self) -> list[UniqueCaption]:
        """Returns the unique captions in the order of their keys."""
        return [self._unique[key] for key in sorted(self._unique)]
