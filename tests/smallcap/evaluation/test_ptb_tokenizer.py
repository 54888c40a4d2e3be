"""The tokenizer in Python against the words that Stanford's Java program makes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallcap.evaluation.java_tools import has_java
from smallcap.evaluation.ptb_tokenizer import PUNCTUATION, tokenize_captions, tokenize_in_java, tokenize_in_python

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "ptb_tokens.json").read_text())
needs_java = pytest.mark.skipif(not has_java(), reason="no Java runs here")


def test_python_makes_the_golden_words() -> None:
    assert len(GOLDEN) > 200
    assert [[caption, tokenize_in_python(caption)] for caption, _ in GOLDEN] == GOLDEN


@needs_java
def test_java_makes_the_golden_words() -> None:
    words, tokenizer = tokenize_captions([caption for caption, _ in GOLDEN])
    assert tokenizer == "ptb-java"
    assert words == [tokens for _, tokens in GOLDEN]


@needs_java
def test_java_keeps_captions_apart_whatever_is_in_them() -> None:
    captions = ["", "two\nlines", "a\r\nb\u2028c", " . ", "the last"]
    assert tokenize_in_java(captions) == ["", "two lines", "a b c", "", "the last"]
    assert tokenize_in_java([]) == []


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog, (a big one) isn't here!", "a dog -lrb- a big one -rrb- is n't here"),
        ("the man’s “t-shirt” … – wet", "the man 's t-shirt wet"),
        ("", ""),
        (" . , - ", ""),
    ],
)
def test_words_are_lower_case_without_punctuation(caption: str, words: str) -> None:
    assert tokenize_in_python(caption) == words


@given(st.text())
def test_any_text_becomes_words_between_single_spaces(text: str) -> None:
    words = tokenize_in_python(text)
    assert words == " ".join(words.split(" ")).strip()
    assert not PUNCTUATION & set(words.split(" "))
