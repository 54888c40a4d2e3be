"""Builds prompts from the token ids of their captions, which it remembers: tokenising is most of a prompt's cost.

A prompt is joined from pieces that were tokenised alone, and has the ids that its whole text has. This follows from how
a byte-level BPE splits text before it merges: no match depends on what stands before it, and a match that ends in
another character than white space does not go on into white space. So text can be cut where white space follows
another character. Special tokens do not change this where none of them contains white space or takes in what stands
beside it. For every other tokenizer, template and caption, the whole text is tokenised.

Source: openai/gpt-2 src/encoder.py `Encoder.pat`.
"""

from __future__ import annotations

import string
from array import array
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, TypeAlias

import pyarrow as pa
from tokenizers import models, pre_tokenizers

from smallcap.index.retriever import Neighbours
from smallcap.model.prompt import PromptTemplate, build_prompts, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 1 << 18  # pieces, in about 80 MB
_WHITE_SPACE = (" ", "\n", "\r", "\t")  # by any definition

Piece: TypeAlias = "array[int]"
"""The token ids of a caption in a prompt, with the separator before it and, of the last one, the ending."""


class PromptBuilder:
    """Builds prompts for one tokenizer and one index; for one thread at a time.

    Args:
        tokenizer: The decoder's tokenizer.
        template: The words around the captions.
        bos_token_id: Token that prompts start with, for a decoder that was trained with one (OPT).
        remembered: The most pieces that are remembered.

    Attributes:
        joins: Whether prompts can be joined from pieces.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        bos_token_id: int | None = None,
        remembered: int = _REMEMBERED,
    ) -> None:
        self._tokenizer, self._template, self._bos_token_id = tokenizer, template, bos_token_id
        self.joins = _splits_at_white_space(tokenizer) and _can_be_cut(template)
        opening, _, closing = template.with_retrieval.partition(template.placeholder)
        first, self._closing = encode_texts(tokenizer, [opening.removesuffix(template.separator), closing])
        self._opening = first if bos_token_id is None else [bos_token_id, *first]
        (self._without_retrieval,) = self._from_texts([[]])
        # By twice the caption's id, plus 1 for the last one of a prompt. When the newer half is full, it takes the
        # place of the older one: about what a list ordered by last use would keep, but cheaper.
        self._newer: dict[int, Piece | None] = {}
        self._older: dict[int, Piece | None] = {}
        self._half = max(1, remembered // 2)

    def build(self, neighbours: Neighbours) -> list[list[int]]:
        """Returns the prompt of each of B images as token ids; without neighbours, the one without retrieval."""
        bounds = list(pairwise(neighbours.offsets.tolist()))
        joined = self._join(neighbours, bounds) if self.joins else [None] * len(bounds)
        whole = [image for image, prompt in enumerate(joined) if prompt is None]
        texts = [neighbours.texts[slice(*bounds[image])].to_pylist() for image in whole]
        tokenised = dict(zip(whole, self._from_texts(texts), strict=True))
        return [tokenised[image] if prompt is None else prompt for image, prompt in enumerate(joined)]

    def _from_texts(self, retrieved: Sequence[Sequence[str]]) -> list[list[int]]:
        return build_prompts(self._tokenizer, self._template, retrieved, self._bos_token_id)

    def _join(self, neighbours: Neighbours, bounds: Sequence[tuple[int, int]]) -> list[list[int] | None]:
        """Returns each image's prompt; None where it has to be tokenised as a whole."""
        keys = (2 * neighbours.ids[neighbours.found]).tolist()
        for start, end in bounds:
            if end > start:
                keys[end - 1] += 1
        pieces = self._pieces(keys, neighbours.texts)
        return [
            self._join_pieces(pieces[start:end]) if end > start else self._without_retrieval for start, end in bounds
        ]

    def _join_pieces(self, pieces: Sequence[Piece | None]) -> list[int] | None:
        known = [piece for piece in pieces if piece is not None]
        if len(known) < len(pieces):
            return None
        return [*self._opening, *chain.from_iterable(known), *self._closing]

    def _pieces(self, keys: Sequence[int], texts: pa.StringArray) -> list[Piece | None]:
        """Returns the pieces of some captions; None for one after which a prompt cannot be cut."""
        unknown: dict[int, int] = {}
        for place, key in enumerate(keys):
            if key not in self._newer:
                if key in self._older:
                    self._newer[key] = self._older[key]
                else:
                    unknown[key] = place
        if unknown:
            self._newer |= self._tokenise(list(unknown), texts.take(pa.array(list(unknown.values()))).to_pylist())
        pieces = [self._newer[key] for key in keys]
        if len(self._newer) > self._half:
            self._newer, self._older = {}, self._newer
        return pieces

    def _tokenise(self, keys: Sequence[int], texts: Sequence[str]) -> dict[int, Piece | None]:
        template = self._template
        pieces = [
            f"{template.separator}{text}{template.ending if key % 2 else ''}"
            for key, text in zip(keys, texts, strict=True)
        ]
        encoded = encode_texts(self._tokenizer, pieces)
        return {
            key: array("i", ids) if _ends_in_no_white_space(piece) else None
            for key, piece, ids in zip(keys, pieces, encoded, strict=True)
        }


def _splits_at_white_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is a byte-level BPE with GPT-2's rule, and no special token reaches over white space."""
    if not tokenizer.is_fast:
        return False
    backend = tokenizer.backend_tokenizer
    rule, model = backend.pre_tokenizer, backend.model
    return (
        backend.normalizer is None
        and isinstance(rule, pre_tokenizers.ByteLevel)
        and rule.use_regex
        and not rule.add_prefix_space
        and isinstance(model, models.BPE)
        and not model.dropout
        and not any(
            token.lstrip or token.rstrip or token.single_word or token.content.split() != [token.content]
            for token in backend.get_added_tokens_decoder().values()
        )
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
