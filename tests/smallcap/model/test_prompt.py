import json
from pathlib import Path
from typing import Any

import pytest

from smallcap.errors import CheckpointError
from smallcap.model.prompt import (
    PromptTemplate,
    build_prompts,
    build_training_example,
    decode_captions,
    encode_texts,
    load_tokenizer,
)

GOLDEN = Path(__file__).parents[2] / "golden"
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
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    assert decode_captions(tokenizer, [ids, [], ids], eos_token_id=13) == [caption, "", caption]


def test_long_captions_are_cut_for_training() -> None:
    input_ids, labels = build_training_example([1, 2, 3], list(range(10, 50)), 13, 0, max_caption_tokens=25)
    assert input_ids == [1, 2, 3, *range(10, 35)]
    assert labels == [-100, -100, *range(10, 35), 13]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
