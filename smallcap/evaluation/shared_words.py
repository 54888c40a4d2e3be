"""The words that captions share with their neighbours, and neighbours with each other: whole columns at a time.

This module owns what `copied_share` and `neighbour_agreement` mean. Words are those of `tokenize_in_python`. A run
computes both for every image, so no Python loop sees an image: texts are split by Arrow, and only chunks between spaces
that differ are tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smallcap.evaluation.caption_words import is_content_word
from smallcap.evaluation.ptb_tokenizer import CROSSES_SPACES, tokenize_in_python

COPIED_WORDS = 3  # in a row
_HELD = "\x01"  # stands for a space at which a text must not be split
_CROSSING = CROSSES_SPACES.pattern
_REMEMBERED = 1 << 17  # chunks
_ODD = np.uint64(0x9E3779B97F4A7C15)  # of a polynomial hash, modulo 2^64


@dataclass(frozen=True)
class SharedWords:
    """What the words of B captions and of their neighbours have in common."""

    copied_share: pa.Array  # [B] float32; null where a caption has no word or no neighbour
    neighbour_agreement: pa.Array  # [B] float32; null where an image has no two neighbours with content words


def measure_shared_words(captions: pa.Array | pa.ChunkedArray, neighbours: pa.Array | pa.ChunkedArray) -> SharedWords:
    """Compares the words of captions and of their neighbours.

    `copied_share` is the share of a caption's sequences of three words that stand in one of its neighbours as well. A
    caption of one or two words is one sequence.

    `neighbour_agreement` compares each neighbour with each other, by their different content words: those that both
    have as a share of those that either has, both summed over all pairs.

    Args:
        captions: [B] strings.
        neighbours: [B] lists of structs with a field `text`, as the column `neighbours` of a run.
    """
    counts = pc.fill_null(pc.list_value_length(neighbours), 0).to_numpy().astype(np.int64)
    texts = pc.struct_field(_plain(pc.list_flatten(neighbours)), "text")
    images = np.arange(len(counts))
    words = _Words.of(
        pa.concat_arrays([_plain(captions).fill_null(""), texts.fill_null("")]),
        np.concatenate([images, np.repeat(images, counts)]),
    )
    return SharedWords(_copied_share(words, counts), _neighbour_agreement(words, counts))


def _plain(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


@dataclass(frozen=True)
class _Words:
    """All words of texts, one text after the other."""

    ids: np.ndarray  # [W] int64
    text: np.ndarray  # [W] int64, the text of each word, ascending
    image: np.ndarray  # [T] int64, the image of each text; the first B texts are the captions of B images
    names: Sequence[str]  # words by id

    @classmethod
    def of(cls, texts: pa.StringArray, image: np.ndarray) -> _Words:
        chunks = pc.split_pattern(texts, " ")
        encoded = pc.dictionary_encode(pc.list_flatten(chunks))
        different = encoded.dictionary.to_pylist()
        if any(map(_crosses_spaces, different)):
            crossing = pc.match_substring_regex(texts, _CROSSING, ignore_case=True)
            held = pc.if_else(crossing, pc.replace_substring(texts, " ", _HELD), texts)
            if not held.equals(texts):
                return cls.of(held, image)
        tokens = list(map(_tokens, different))
        known: dict[str, int] = {}
        flat = np.array([known.setdefault(word, len(known)) for words in tokens for word in words], np.int64)
        lengths = np.array(list(map(len, tokens)), np.int64)
        codes = encoded.indices.to_numpy()
        in_chunk = lengths[codes]  # words of each chunk, most often one
        first = (np.cumsum(lengths) - lengths)[codes] - (np.cumsum(in_chunk) - in_chunk)
        ids = flat[np.repeat(first, in_chunk) + np.arange(in_chunk.sum())]
        text = np.repeat(np.arange(len(texts)), pc.list_value_length(chunks).to_numpy())
        return cls(ids, np.repeat(text, in_chunk), image, list(known))


@lru_cache(maxsize=_REMEMBERED)
def _tokens(chunk: str) -> tuple[str, ...]:
    return tuple(tokenize_in_python(chunk.replace(_HELD, " ")).split())


@lru_cache(maxsize=_REMEMBERED)
def _crosses_spaces(chunk: str) -> bool:
    """Says whether the tokens of a text in which a chunk stands may reach over the space that follows it."""
    return CROSSES_SPACES.search(f"{chunk} ") is not None


def _copied_share(words: _Words, counts: np.ndarray) -> pa.Array:
    images, image = len(counts), words.image[words.text]
    lengths = np.minimum(np.bincount(words.text, minlength=len(words.image))[:images], COPIED_WORDS)
    lengths[counts == 0] = 0
    end = np.searchsorted(words.text, images)  # of the captions' words
    shares, ids = np.full(images, np.nan, np.float32), words.ids.astype(np.uint64)
    for length in range(1, COPIED_WORDS + 1):
        asked = lengths == length
        if not asked.any():
            continue
        size = len(ids) - length + 1
        keys = image[:size].astype(np.uint64)  # of the sequence that begins at each word
        for offset in range(length):
            keys = keys * _ODD + ids[offset : size + offset]
        is_within_text = words.text[:size] == words.text[length - 1 :]
        own = np.flatnonzero(is_within_text[:end] & asked[image[:size][:end]])
        held = pa.array(keys[end:][is_within_text[end:]])
        found = pc.is_in(pa.array(keys[own]), value_set=held).to_numpy(zero_copy_only=False)
        copied = np.bincount(image[own], weights=found, minlength=images)
        shares[asked] = copied[asked] / np.bincount(image[own], minlength=images)[asked]
    return pa.array(shares, from_pandas=True)  # NaN is null


def _neighbour_agreement(words: _Words, counts: np.ndarray) -> pa.Array:
    images, size = len(counts), max(1, len(words.names))
    is_content = np.array([is_content_word(word) for word in words.names], bool)
    chosen = np.flatnonzero((words.text >= images) & is_content[words.ids])
    text, image = words.text[chosen] - images, words.image[words.text[chosen]]
    encoded = pc.dictionary_encode(pa.array(image * size + words.ids[chosen]))  # an image and a word
    has = np.zeros((len(encoded.dictionary), counts.max(initial=1)), bool)  # whether a neighbour of it has the word
    has[encoded.indices.to_numpy(), text - (np.cumsum(counts) - counts)[image]] = True
    numbers, image = has.sum(axis=1), encoded.dictionary.to_numpy() // size
    both = np.bincount(image, weights=numbers * (numbers - 1) / 2, minlength=images)
    either = (counts - 1) * np.bincount(image, weights=numbers, minlength=images) - both
    agreement = np.full(images, np.nan, np.float32)
    np.divide(both, either, out=agreement, where=(counts > 1) & (either > 0), casting="same_kind")
    return pa.array(agreement, from_pandas=True)
