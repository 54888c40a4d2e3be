"""Joined prompts are what tokenising the whole text gives, for any caption and any tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smallcap.index.retriever import Neighbours
from smallcap.model.prompt import PromptTemplate, build_prompts, load_tokenizer
from smallcap.model.prompt_builder import PromptBuilder

ODD = [
    "", " ", "\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u200b", "\u3000", "\ufeff",
    "'", "'s", "'t x", "'ll", "\u2019s", ".", "...", "!?", "||", "é", "e\u0301", "中文", "日本。", "١٢", "²", "🐕",
    "\u0600", "<|endoftext|>", "<|endoftext|", "</s>", "<s> a", "a dog", " on", "A cat. ", "1 bus", "x-y",
    "Similar images show",
]  # fmt: skip
CAPTIONS = st.lists(st.sampled_from(ODD) | st.text(max_size=8), max_size=4).map("".join)
RETRIEVED = st.lists(st.lists(CAPTIONS, max_size=5), min_size=1, max_size=4)


def gpt2() -> Any:
    return load_tokenizer("gpt2")


def opt() -> Any:
    tokenizer: Any = load_tokenizer("gpt2")
    tokenizer.add_special_tokens(["</s>", "<pad>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def xglm() -> Any:
    """A sentencepiece vocabulary of single characters and a few words, as XGLM's tokenizer reads its own."""
    pieces = [
        "<unk>",
        "\u2581",
        "\u2581a",
        "\u2581dog",
        "dog",
        "\u2581This",
        ".",
        "\u2581\u2581",
        "ow",
        "s\u2581",
        "sh",
        *map(chr, range(33, 127)),
    ]
    model = models.Unigram(
        [(piece, -float(len(pieces) - i)) for i, piece in enumerate(dict.fromkeys(pieces))], unk_id=0
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"gpt2": (gpt2(), None), "opt": (opt(), 2), "xglm": (xglm(), None)}
TEMPLATES = (
    PromptTemplate(),
    PromptTemplate(separator="\n", with_retrieval="\n||\tso: ", ending=""),
    PromptTemplate(separator="\n", with_retrieval="Like\n||\n\nOr ||\n", ending="'s"),  # it cannot be cut
    PromptTemplate(separator=" and ", with_retrieval="Like ||\n", ending=" "),  # nor can this one
)


def columns(retrieved: list[list[str]]) -> Neighbours:
    ids = np.full((len(retrieved), 5), -1)
    for row, texts in enumerate(retrieved):
        ids[row, : len(texts)] = range(len(texts))
    texts = pa.array([text for texts in retrieved for text in texts], pa.string())
    sources = pa.array([["a.csv"]] * len(texts), pa.list_(pa.string()))
    return Neighbours(ids, np.zeros(ids.shape, np.float32), texts, sources)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_joined_prompt_has_the_ids_of_its_text(
    name: str, template: PromptTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smallcap.model.prompt_builder._REMEMBERED", 50)
    tokenizer, bos = TOKENIZERS[name]
    builder = PromptBuilder(tokenizer, template, bos)
    assert builder.joins == (name != "xglm" and template in TEMPLATES[:2])

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(RETRIEVED)
    def check(retrieved: list[list[str]]) -> None:
        expected = build_prompts(tokenizer, template, retrieved, bos)
        for _ in range(2):  # the second time from what is remembered
            assert builder.build(columns(retrieved)) == expected

    check()


def test_a_word_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = PromptBuilder(TOKENIZERS["gpt2"][0], PromptTemplate())
    builder.build(columns([["a dog on a", "a cat"], []]))
    monkeypatch.setattr("smallcap.model.prompt_builder.encode_texts", lambda *_: pytest.fail("tokenised again"))
    found = builder.build(columns([["a dog", "a dog on a cat"]]))
    assert found == build_prompts(TOKENIZERS["gpt2"][0], PromptTemplate(), [["a dog", "a dog on a cat"]])


def _changed(**changes: Any) -> Any:
    tokenizer: Any = load_tokenizer("gpt2")
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def _with_token(token: AddedToken) -> Any:
    tokenizer: Any = load_tokenizer("gpt2")
    tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        _changed(normalizer=normalizers.NFC()),
        _changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        _changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        _changed(model=models.BPE(dropout=0.1)),
        _with_token(AddedToken("<x>", lstrip=True)),
        _with_token(AddedToken("<x>", rstrip=True)),
        _with_token(AddedToken("x", single_word=True)),
        _with_token(AddedToken("a\n")),
    ],
    ids=["normalizer", "prefix space", "no rule", "dropout", "lstrip", "rstrip", "single word", "white space"],
)
def test_other_tokenizers_get_the_whole_text(tokenizer: Any) -> None:
    assert not PromptBuilder(tokenizer, PromptTemplate()).joins
