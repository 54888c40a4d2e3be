"""Decides which captions enter the datastore, and brings them to normal form; it reads no file but the blocklist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b, sha256
from typing import Any

from index_builder.dumps.deduplication import Row
from index_builder.dumps.filters import (
    holds_markup,
    holds_repeats,
    holds_url,
    load_blocklist,
    read_blocklist,
)
from smallcap.captions.normal_form import fold_caption, normalise
from smallcap.captions.rows import MALFORMED, CaptionRow
from smallcap.config import CleaningConfig
from smallcap.model.prompt import count_tokens, load_tokenizer

RULES_VERSION = 2
"""Recorded in a manifest's `filters`; raised when the same dump and options would give other captions."""

KEY_BYTES = 16


def caption_key(text: str) -> bytes:
    """Returns the blake2b-128 of a text after NFKC and case folding, with white space collapsed."""
    return blake2b(fold_caption(text).encode(), digest_size=KEY_BYTES).digest()


def describe_filters(config: CleaningConfig) -> dict[str, Any]:
    """Returns what an index's manifest records of the filters: the options and the blocklist's sha256.

    Raises:
        ConfigError: The blocklist does not exist.
        StorageError: The blocklist cannot be read.
    """
    digest = None if config.blocklist is None else sha256(read_blocklist(config.blocklist)).hexdigest()
    return {**config.model_dump(mode="json"), "blocklist_sha256": digest}


_JUNK = (
    ("urls", "url", holds_url),
    ("markup", "markup", holds_markup),
    ("repeats", "repeated_characters", holds_repeats),
)


class Cleaner:
    """Applies the filters to rows of a dump.

    A row is dropped for the first of these reasons that applies: the `problem` that the reader found, `empty`,
    `malformed` (half a surrogate pair), `too_few_words`, `url`, `markup`, `repeated_characters`, `blocklisted`,
    `too_long`.

    Args:
        config: The filters; its tokenizer and blocklist are loaded here.

    Raises:
        CheckpointError: The tokenizer cannot be found or loaded.
        ConfigError: The blocklist is missing, empty or not UTF-8.
        StorageError: The blocklist cannot be read.
    """

    def __init__(self, config: CleaningConfig) -> None:
        self._config = config
        self._tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
        self._junk = [(reason, holds) for name, reason, holds in _JUNK if name in config.drop]
        self._blocklist = None if config.blocklist is None else load_blocklist(config.blocklist)

    def clean(self, rows: Iterable[CaptionRow], sources: tuple[int, ...] = ()) -> tuple[list[Row], Counter[str]]:
        """Returns the rows that pass, in order and without superfluous white space, and the count dropped by reason.

        Args:
            rows: The dump's rows.
            sources: The sources that cleaned rows name.
        """
        dropped: Counter[str] = Counter()
        candidates: list[tuple[str, str | None, bytes | None]] = []
        for row in rows:
            text = " ".join(row.text.split())
            image_id = (row.image_id or "").strip() or None
            reason = row.problem or self._reason(text, image_id)
            if reason:
                dropped[reason] += 1
            else:
                candidates.append((text, image_id, row.vector))
        kept = []
        lengths = self._lengths([text for text, _, _ in candidates])
        for (text, image_id, vector), length in zip(candidates, lengths, strict=True):
            if length > self._config.max_tokens:
                dropped["too_long"] += 1
            else:
                kept.append(Row(caption_key(text), text, sources, (image_id,) if image_id else (), vector))
        return kept, dropped

    def _reason(self, text: str, image_id: str | None) -> str:
        if not text:
            return "empty"
        try:
            f"{text}{image_id}".encode()
        except UnicodeEncodeError:  # JSON can hold half a surrogate pair, which is not text
            return MALFORMED
        if text.count(" ") + 1 < self._config.min_words:
            return "too_few_words"
        for reason, holds in self._junk:
            if holds(text):
                return reason
        return "blocklisted" if self._blocklist is not None and self._blocklist.matches(normalise(text)) else ""

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Returns each text's number of tokens, or of words where there is no tokenizer."""
        if self._tokenizer is None:
            return [text.count(" ") + 1 for text in texts]
        return count_tokens(self._tokenizer, texts)
