import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallcap.errors import CheckpointError
from smallcap.model.files import tokenizer_folder
from smallcap.model.prompt import (
    PromptTemplate,
    build_prompts,
    build_training_example,
    count_tokens,
    decode_captions,
    encode_texts,
    load_tokenizer,
)

GOLDEN = Path(__file__).parents[2] / "golden"
ODD = [" ", "\n", "\xa0", "'ll", "é", "e\u0301", "中文", "🐕", "<|endoftext|>", "<|endoftext|", " a dog", "\x85"]
ORACLE: dict[str, Any] = json.loads((GOLDEN / "oracle" / "prompts.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("gpt2")


@pytest.mark.parametrize("case", ORACLE["cases"], ids=range(len(ORACLE["cases"])))
def test_prompts_and_labels_are_the_references(tokenizer: Any, case: dict[str, Any]) -> None:
    (prompt,) = build_prompts(tokenizer, PromptTemplate(), [case["retrieved"][: case["k"]]])
    assert prompt == case["prompt_ids"]
    (target,) = encode_texts(tokenizer, [case["target"]])
    input_ids, labels = build_training_example(
        prompt, target, ORACLE["eos_id"], ORACLE["pad_id"], length=case["train_max_length"]
    )
    assert input_ids == case["train_input_ids"]
    assert labels == case["train_labels"]


def test_the_short_prompt_and_special_tokens_have_the_references_ids(tokenizer: Any) -> None:
    assert build_prompts(tokenizer, PromptTemplate(), [[]]) == [ORACLE["no_retrieval_prompt_ids"]]
    assert encode_texts(tokenizer, [ORACLE["pad_token"], ORACLE["eos_token"]]) == [[0], [13]]


@pytest.mark.parametrize(
    ("generated", "caption"),
    [
        ("a man riding a horse.", "a man riding a horse"),
        ("a man. a dog", "a man"),
        ("a dog says hi!", "a dog says hi!"),
        ("<|endoftext|>a cat on a mat.", "a cat on a mat"),
        (".", ""),
        # the reference splits the decoded text at "This image shows ", which a retrieved caption can hold
        ("a sign that reads This image shows a cat.", "a sign that reads This image shows a cat"),
    ],
)
def test_a_caption_ends_at_eos_and_has_no_special_tokens(tokenizer: Any, generated: str, caption: str) -> None:
    ids = [i for piece in generated.split("<|endoftext|>") if piece for i in encode_texts(tokenizer, [piece])[0]]
    if generated.startswith("<|"):
        ids = [50256, *ids]
    assert decode_captions(tokenizer, [ids, [], ids], eos_token_id=13) == [caption, "", caption]


def test_long_captions_are_cut_for_training() -> None:
    input_ids, labels = build_training_example([1, 2, 3], list(range(10, 50)), 13, 0, max_caption_tokens=25)
    assert input_ids == [1, 2, 3, *range(10, 35)]
    assert labels == [-100, -100, *range(10, 35), 13]


def test_gpt2s_files_make_the_tokenizer_of_transformers(tokenizer: Any) -> None:
    from transformers import GPT2TokenizerFast

    folder = tokenizer_folder("gpt2")
    theirs = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(st.lists(st.sampled_from(ODD) | st.text(max_size=8), max_size=6).map("".join))
    def check(text: str) -> None:
        ids = theirs(text)["input_ids"]
        assert encode_texts(tokenizer, [text]) == [ids]
        assert count_tokens(tokenizer, [text]) == [len(ids)]
        decoded = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert decode_captions(tokenizer, [ids], eos_token_id=-1) == [decoded.strip()]

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer is damaged"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
