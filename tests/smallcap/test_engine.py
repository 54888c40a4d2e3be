"""The engine against the reference implementation, and any batch against a batch of one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smallcap.checkpoint import SmallCapModel, load_checkpoint
from smallcap.engine import causal_mask, pad_prompts
from smallcap.errors import ConfigError

ORACLE = Path(__file__).parents[1] / "golden" / "oracle"
BEAMS = {"greedy": 1, "beam3": 3, "beam5": 5}


class Case:
    """One oracle checkpoint with its inputs and the reference's outputs."""

    def __init__(self, name: str) -> None:
        folder = ORACLE / name
        self.model: SmallCapModel = load_checkpoint(str(folder))
        self.expected: dict[str, Any] = json.loads((folder / "expected.json").read_text())
        self.arrays = np.load(folder / "expected.npz")
        self.prompts: list[list[int]] = self.expected["prompts"]
        self.hidden_states: Tensor = torch.tensor(self.arrays["encoder_last_hidden_state"])


@pytest.fixture(scope="module", params=["gpt2_r4", "gpt2_r1"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_the_vision_encoder_is_the_references(case: Case) -> None:
    hidden_states = case.model.encode_images(torch.tensor(case.arrays["pixel_values"]))
    assert hidden_states.shape == case.hidden_states.shape
    assert (hidden_states - case.hidden_states).abs().max() < 1e-4


def test_logits_are_the_references(case: Case) -> None:
    decoder = case.model.decoder
    for index, prompt in enumerate(case.prompts):
        ids = torch.tensor([prompt])
        mask = torch.zeros(1, 1, len(prompt), len(prompt)).masked_fill(
            ~causal_mask(torch.ones_like(ids, dtype=torch.bool)), -torch.inf
        )
        cross_kv = decoder.cross_attention_kv(case.hidden_states[index : index + 1])
        with torch.inference_mode():
            logits = decoder.logits(decoder(ids, torch.arange(len(prompt))[None], mask, cross_kv))
        reference = torch.tensor(case.arrays[f"logits_{index}"])
        assert (logits[0, -len(reference) :] - reference).abs().max() < 2e-3


@pytest.mark.parametrize("name", BEAMS)
def test_token_ids_are_the_references_alone(case: Case, name: str) -> None:
    for index, expected in enumerate(case.expected["cases"]):
        (generated,) = case.model.generate(
            case.hidden_states[index : index + 1], [case.prompts[index]], num_beams=BEAMS[name]
        )
        assert generated.token_ids == expected[name]
        if f"{name}_score" in expected:
            assert generated.score == pytest.approx(expected[f"{name}_score"], abs=1e-3)


@pytest.mark.parametrize("name", BEAMS)
def test_token_ids_are_the_references_in_one_batch(case: Case, name: str) -> None:
    generated = case.model.generate(case.hidden_states, case.prompts, num_beams=BEAMS[name])
    assert [one.token_ids for one in generated] == [expected[name] for expected in case.expected["cases"]]


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, 7), min_size=1, max_size=12), name=st.sampled_from(sorted(BEAMS)))
def test_token_ids_are_the_references_in_any_mix(rows: list[int], name: str) -> None:
    case = _r4()
    generated = case.model.generate(
        case.hidden_states[rows], [case.prompts[row] for row in rows], num_beams=BEAMS[name]
    )
    assert [one.token_ids for one in generated] == [case.expected["cases"][row][name] for row in rows]


def _r4(cache: dict[str, Case] = {}) -> Case:  # noqa: B006 - hypothesis wants no function-scoped fixture
    if not cache:
        cache["r4"] = Case("gpt2_r4")
    return cache["r4"]


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    num_beams=st.integers(1, 5),
    max_new_tokens=st.integers(1, 12),
    length_penalty=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_a_batch_is_its_images_alone(
    lengths: list[int], num_beams: int, max_new_tokens: int, length_penalty: float, seed: int
) -> None:
    model = _r4().model
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(len(lengths), 17, 64, generator=generator)
    prompts = [torch.randint(1, 600, (length,), generator=generator).tolist() for length in lengths]
    options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
    together = model.generate(hidden_states, prompts, **options)  # type: ignore[arg-type]
    for row, prompt in enumerate(prompts):
        (alone,) = model.generate(hidden_states[row : row + 1], [prompt], **options)  # type: ignore[arg-type]
        assert together[row].token_ids == alone.token_ids
        assert together[row].score == pytest.approx(alone.score, abs=1e-3)
        assert len(alone.token_ids) <= max_new_tokens


def test_low_precision_runs(case: Case) -> None:
    model = load_checkpoint(str(ORACLE / "gpt2_r4"), dtype="bfloat16")
    generated = model.generate(case.hidden_states.bfloat16(), case.prompts)
    assert all(1 <= len(one.token_ids) <= 25 and np.isfinite(one.score) for one in generated)


def test_an_empty_batch_gives_nothing(case: Case) -> None:
    assert case.model.generate(case.hidden_states[:0], []) == []


def test_prompts_that_do_not_fit_are_refused(case: Case) -> None:
    one = case.hidden_states[:1]
    with pytest.raises(ConfigError, match="one prompt per image"):
        case.model.generate(one, [[1], [2]])
    with pytest.raises(ConfigError, match="empty"):
        case.model.generate(one, [[]])
    case.model.generate(one, [[1] * 250], max_new_tokens=7)  # 256 positions: the last token is never fed back
    with pytest.raises(ConfigError, match="256"):
        case.model.generate(one, [[1] * 250], max_new_tokens=8)


def test_padding_is_on_the_left() -> None:
    ids, mask = pad_prompts([[5, 6, 7], [8]], pad_token_id=0, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
