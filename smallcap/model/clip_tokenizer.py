"""Tokenises batches of captions for CLIP's text encoders; what a word becomes is remembered.

CLIP's rule takes no match across white space and looks at nothing beside a match. What the cleaning before it changes
in printable ASCII, case and white space, it changes within words or between them. Such a text therefore has the tokens
of its words. Every other text, and every text for another tokenizer, is tokenised as a whole.

Source: openai/CLIP clip/simple_tokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from smallcap.model.prompt import specials_stay_within_words

_REMEMBERED_WORDS = 1 << 16
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
}
_SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>|"
_RULE = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Turns texts into the token ids that an encoder's tokenizer gives, start and end included.

    Args:
        whole: Tokenises texts, start and end included, cut to `max_tokens`.
        word: Tokenises a word alone, without start and end; None where texts do not have the tokens of their words.
        max_tokens: The most tokens of a text.
    """

    def __init__(
        self,
        whole: Callable[[Sequence[str]], list[list[int]]],
        word: Callable[[str], Sequence[int]] | None,
        max_tokens: int,
    ) -> None:
        self._whole, self._max_tokens = whole, max_tokens
        self.by_words = word is not None
        if word is not None:
            self._word = lru_cache(_REMEMBERED_WORDS)(word)
            ((self._start, self._end),) = whole([""])

    @classmethod
    def of_tokenizers(cls, backend: Tokenizer, max_tokens: int) -> ClipTokenizer:
        """Takes a tokenizer of the library `tokenizers`; its truncation and padding are set here."""
        backend.no_padding()
        backend.enable_truncation(max_tokens)

        def whole(texts: Sequence[str]) -> list[list[int]]:
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]

        def word(text: str) -> Sequence[int]:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
            return ids

        return cls(whole, word if _is_clips(backend) else None, max_tokens)

    @classmethod
    def of_open_clip(cls, tokenizer: Any) -> ClipTokenizer | None:
        """Takes a tokenizer of open_clip; returns None for one that is not CLIP's own."""
        from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

        known = (
            type(tokenizer) is SimpleTokenizer
            and tokenizer.clean_fn is get_clean_fn("lower")
            and tokenizer.reduction_fn is None
            and len(tokenizer.all_special_ids) == 2
        )
        if not known:
            return None
        start, end, most = tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.context_length

        def whole(texts: Sequence[str]) -> list[list[int]]:
            return [[start, *tokenizer.encode(text)[: most - 2], end] for text in texts]

        return cls(whole, tokenizer.encode, most)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's token ids, at most `max_tokens`."""
        if not self.by_words:
            return self._whole(texts)
        is_plain = [
            text.isascii() and text.isprintable() and "&" not in text for text in texts
        ]  # & may begin an entity
        others = iter(self._whole([text for text, plain in zip(texts, is_plain, strict=True) if not plain]))
        return [self._by_words(text) if plain else next(others) for text, plain in zip(texts, is_plain, strict=True)]

    def _by_words(self, text: str) -> list[int]:
        ids = list(chain.from_iterable(map(self._word, text.split())))
        return [self._start, *ids[: self._max_tokens - 2], self._end]


def _is_clips(backend: Any) -> bool:
    """Whether a tokenizer cleans and splits text as CLIP's does, and no special token reaches over white space."""
    if backend.normalizer is None or backend.pre_tokenizer is None:
        return False
    split, *others = json.loads(backend.pre_tokenizer.__getstate__()).get("pretokenizers", [{}])
    rule = split.get("pattern", {}).get("Regex", "").removeprefix(_SPECIAL)
    return (
        json.loads(backend.normalizer.__getstate__()) == _NORMALIZER
        and rule == _RULE
        and (split["type"], split["behavior"], split["invert"]) == ("Split", "Removed", True)
        and [(other["type"], other["add_prefix_space"]) for other in others] == [("ByteLevel", False)]
        and specials_stay_within_words(backend)
    )
