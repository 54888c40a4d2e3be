"""Batches of texts get the tokens that the encoders' own tokenizers give each of them."""

from __future__ import annotations

import gzip
from typing import Any

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode, default_bpe
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import CLIPTokenizer

from smallcap.benchmark.random_content import build_tokenizer
from smallcap.model.clip import pad_right
from smallcap.model.clip_tokenizer import ClipTokenizer

MOST = 77
ODD = [
    "", " ", "  ", "\n", "\t", "\xa0", "\u2003", "A Dog", "it's", "IT'S", "'T x", "dogs'll", "don't", "x1y22", "...",
    "a&amp;b", "& lt;", "&lt;p&gt;", "é", "e\u0301", "İ", "中文", "ﬁ", "\x1b[0m", "\x85", "“q”", "<|endoftext|>",
    "<|startoftext|>a", "<end_of_text>", "<start_of_text> b", "</w>", "word " * 90,
]  # fmt: skip
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
TEXTS = st.lists(
    st.lists(st.sampled_from(ODD) | ASCII | st.text(max_size=8), max_size=4).map("".join), min_size=1, max_size=4
)


def clip_tokenizer() -> Any:
    """transformers' tokenizer of CLIP; open_clip has its vocabulary."""
    with gzip.open(default_bpe()) as file:
        merges = file.read().decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    pairs = [tuple(merge.split()) for merge in merges]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=pairs)  # type: ignore[arg-type]


def test_transformers_texts_get_the_tokens_that_it_gives() -> None:
    theirs = clip_tokenizer()
    ours = ClipTokenizer.of_tokenizers(clip_tokenizer().backend_tokenizer, MOST)
    assert ours.by_words

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(TEXTS)
    def check(texts: list[str]) -> None:
        assert ours(texts) == theirs(texts, truncation=True, max_length=MOST)["input_ids"]

    check()


def test_open_clips_texts_get_the_tokens_that_it_gives() -> None:
    theirs = open_clip.get_tokenizer("RN50x64")
    ours = ClipTokenizer.of_open_clip(theirs)
    assert ours is not None and ours.by_words

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(TEXTS)
    def check(texts: list[str]) -> None:
        ids = pad_right(ours(texts), theirs.context_length)
        assert ids.tolist() == theirs(texts).tolist()

    check()


def test_a_tokenizer_with_another_rule_gets_whole_texts() -> None:
    texts = ["w1 w2, w3!", "w4"]
    theirs = build_tokenizer()
    ours = ClipTokenizer.of_tokenizers(build_tokenizer(), 3)
    assert ours(texts) == [theirs.encode(text).ids[:3] for text in texts]
    changed = [clip_tokenizer() for _ in range(4)]
    changed[0].backend_tokenizer.normalizer = normalizers.NFC()
    changed[1].backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    changed[2].add_tokens([AddedToken("<x>", rstrip=True)])
    changed[3].backend_tokenizer.normalizer = None
    backends = [tokenizer.backend_tokenizer for tokenizer in changed]
    assert not any(ClipTokenizer.of_tokenizers(backend, MOST).by_words for backend in backends)


@pytest.mark.parametrize(
    "changes",
    [{"clean": "canonicalize"}, {"reduction_mask": "simple"}, {"additional_special_tokens": ["a b"]}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_tokenizer_of_open_clip_is_left_as_it_is(changes: dict[str, Any]) -> None:
    assert ClipTokenizer.of_open_clip(SimpleTokenizer(**changes)) is None
