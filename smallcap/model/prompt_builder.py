"""Builds prompts from the token ids of their words, which it remembers: tokenising is most of a prompt's cost.

A prompt is joined from chunks that were tokenised alone, and has the ids that its whole text has. This follows from how
a byte-level BPE splits text before it merges: no match depends on what stands before it, and a match that ends in
another character than white space does not go on into white space. So text can be cut where white space follows
another character: before each word. Special tokens do not change this where none of them contains white space or takes
in what stands beside it. For every other tokenizer, template and word, the whole text is tokenised.

Source: openai/gpt-2 src/encoder.py `Encoder.pat`.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from tokenizers import models, pre_tokenizers

from smallcap.index.retriever import Neighbours
from smallcap.model.prompt import (
    PromptTemplate,
    backend_of,
    build_prompts,
    encode_texts,
    specials_stay_within_words,
)

if TYPE_CHECKING:
    from smallcap.model.prompt import DecoderTokenizer

_REMEMBERED = 1 << 17  # words, in about 35 MB
_WHITE_SPACE = (" ", "\n", "\r", "\t")  # by any definition


class PromptBuilder:
    """Builds prompts for one tokenizer.

    Args:
        tokenizer: The decoder's tokenizer.
        template: The words around the captions.
        bos_token_id: Token that prompts start with, for a decoder that was trained with one (OPT).

    Attributes:
        joins: Whether prompts can be joined.
    """

    def __init__(self, tokenizer: DecoderTokenizer, template: PromptTemplate, bos_token_id: int | None = None) -> None:
        self._tokenizer, self._template, self._bos_token_id = tokenizer, template, bos_token_id
        self.joins = _splits_at_white_space(tokenizer) and _can_be_cut(template)
        opening, _, closing = template.with_retrieval.partition(template.placeholder)
        first, self._closing = encode_texts(tokenizer, [opening.removesuffix(template.separator), closing])
        self._opening = first if bos_token_id is None else [bos_token_id, *first]
        (self._without_retrieval,) = self._from_texts([[]])
        self._after_separator = _Words(tokenizer, template.separator)
        self._after_space = _Words(tokenizer, " ")

    def build(self, neighbours: Neighbours) -> list[list[int]]:
        """Returns the prompt of each of B images as token ids; without neighbours, the one without retrieval."""
        texts = neighbours.texts.to_pylist()
        retrieved = [texts[start:end] for start, end in pairwise(neighbours.offsets.tolist())]
        if not self.joins:
            return self._from_texts(retrieved)
        joined = [self._join(captions) if captions else self._without_retrieval for captions in retrieved]
        whole = [image for image, prompt in enumerate(joined) if prompt is None]
        tokenised = iter(self._from_texts([retrieved[image] for image in whole]))
        return [next(tokenised) if prompt is None else prompt for prompt in joined]

    def _from_texts(self, retrieved: Sequence[Sequence[str]]) -> list[list[int]]:
        return build_prompts(self._tokenizer, self._template, retrieved, self._bos_token_id)

    def _join(self, captions: list[str]) -> list[int] | None:
        """Returns a prompt; None if it has to be tokenised as a whole."""
        ids = self._opening.copy()
        try:
            for caption in [*captions[:-1], captions[-1] + self._template.ending]:
                first, *others = caption.split(" ")
                ids += self._after_separator[first]
                ids += chain.from_iterable(map(self._after_space.__getitem__, others))
        except _UncuttableError:
            return None
        return ids + self._closing


class _UncuttableError(Exception):
    """Text cannot be cut after a word."""


class _Words(dict[str, tuple[int, ...]]):
    """The token ids of words with what stands before them.

    Args:
        tokenizer: The tokenizer.
        before: What stands before each word; it begins with white space.
    """

    def __init__(self, tokenizer: DecoderTokenizer, before: str) -> None:
        super().__init__()
        self._tokenizer, self._before = tokenizer, before

    def __missing__(self, word: str) -> tuple[int, ...]:
        if not word or not _ends_in_no_white_space(word):
            raise _UncuttableError
        if len(self) >= _REMEMBERED:
            self.clear()
        ids = self[word] = tuple(encode_texts(self._tokenizer, [self._before + word])[0])
        return ids


def _splits_at_white_space(tokenizer: DecoderTokenizer) -> bool:
    """Whether a tokenizer is a byte-level BPE with GPT-2's rule, and no special token reaches over white space."""
    backend = backend_of(tokenizer)
    if backend is None:
        return False
    rule, model = backend.pre_tokenizer, backend.model
    return (
        backend.normalizer is None
        and isinstance(rule, pre_tokenizers.ByteLevel)
        and rule.use_regex
        and not rule.add_prefix_space
        and isinstance(model, models.BPE)
        and not model.dropout
        and specials_stay_within_words(backend)
    )


def _can_be_cut(template: PromptTemplate) -> bool:
    """Whether captions are surrounded by white space that follows another character."""
    opening, placeholder, closing = template.with_retrieval.partition(template.placeholder)
    before = opening.removesuffix(template.separator)
    return (
        bool(placeholder)
        and placeholder not in closing
        and template.separator.startswith(_WHITE_SPACE)
        and opening.endswith(template.separator)
        and (not before or _ends_in_no_white_space(before))
        and closing.startswith(_WHITE_SPACE)
    )


def _ends_in_no_white_space(text: str) -> bool:
    """Whether the last character is none by any definition, whatever Unicode's version."""
    return text[-1].isalnum() or text[-1] in string.punctuation
