"""Columns of shared words are what the definitions say, image by image."""

from collections.abc import Sequence
from itertools import combinations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallcap.evaluation.caption_words import content_words
from smallcap.evaluation.ptb_tokenizer import tokenize_in_python
from smallcap.evaluation.shared_words import measure_shared_words
from smallcap.output.schema import NEIGHBOUR_TYPE

WORDS = [
    "a",
    "dog",
    "on",
    "dog's",
    "the",
    "no.",
    "5",
    "<b",
    "x>",
    "t-shirt,",
    ".",
    "🐕",
    "Ünder",
    "don't",
    "a\x85cat",
    "",
]
texts = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)


def columns(captions: Sequence[str | None], neighbours: Sequence[Sequence[str] | None]) -> tuple[pa.Array, pa.Array]:
    rows = [
        None if some is None else [{"caption_id": 0, "text": text, "score": 0.5} for text in some]
        for some in neighbours
    ]
    return pa.array(captions, pa.string()), pa.array(rows, pa.list_(NEIGHBOUR_TYPE))


def copied_share(caption: str | None, neighbours: Sequence[str] | None) -> float | None:
    """Says once more what the column is."""
    words = tokenize_in_python(caption or "").split()
    length = min(3, len(words))
    if not length or not neighbours:
        return None
    held = {sequence for text in neighbours for sequence in sequences(tokenize_in_python(text).split(), length)}
    own = sequences(words, length)
    return sum(sequence in held for sequence in own) / len(own)


def sequences(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def agreement(neighbours: Sequence[str] | None) -> float | None:
    """Says once more what the column is."""
    sets = [content_words([tokenize_in_python(text)]) for text in neighbours or ()]
    pairs = list(combinations(sets, 2))
    either = sum(len(one | other) for one, other in pairs)
    return sum(len(one & other) for one, other in pairs) / either if either else None


@given(st.lists(st.tuples(st.none() | texts, st.none() | st.lists(texts, max_size=4)), max_size=6))
def test_the_columns_are_the_definitions(rows: list[tuple[str | None, list[str] | None]]) -> None:
    captions, neighbours = columns([caption for caption, _ in rows], [some for _, some in rows])
    shared = measure_shared_words(captions, neighbours)
    assert shared.copied_share.to_pylist() == pytest.approx([copied_share(*row) for row in rows])
    assert shared.neighbour_agreement.to_pylist() == pytest.approx([agreement(some) for _, some in rows])


def test_what_is_copied_and_what_agrees() -> None:
    near = ["A dog on the beach.", "two dogs on a beach"]
    rows = [("a dog on the sofa", near), ("Beach", near), ("a dog", ["a cat"]), ("", near), ("a dog", [])]
    shared = measure_shared_words(*columns([caption for caption, _ in rows], [some for _, some in rows]))
    assert shared.copied_share.to_pylist() == pytest.approx([2 / 3, 1, 0, None, None])
    assert shared.neighbour_agreement.to_pylist()[0] == pytest.approx(1 / 4)  # beach, of dog, beach, two, dogs
    assert shared.neighbour_agreement.to_pylist()[2:] == [None, pytest.approx(1 / 4), None]


def test_a_part_of_a_table_is_like_the_whole() -> None:
    captions, neighbours = columns(["a red dog", "b", "a red dog ran"], [["a red dog"], ["c", "c"], ["a red cat"] * 2])
    whole = measure_shared_words(captions, neighbours)
    part = measure_shared_words(pa.chunked_array([captions.slice(1, 1), captions.slice(2)]), neighbours.slice(1))
    assert part.copied_share.equals(whole.copied_share.slice(1))
    assert part.neighbour_agreement.equals(whole.neighbour_agreement.slice(1))
