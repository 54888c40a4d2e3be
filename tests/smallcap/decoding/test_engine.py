"""The engine against the reference implementation, and any batch against a batch of one."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smallcap.config import GenerationConfig
from smallcap.decoding.engine import Generated, additive_mask, causal_mask, generate, pad_prompts
from smallcap.decoding.kv_cache import KVCache, PromptSlots
from smallcap.decoding.packed_linear import PackedLinear, can_pack
from smallcap.decoding.strategy import GenerationOptions
from smallcap.errors import ConfigError
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint
from tests.oracles import ORACLE, ORACLES, expected_of, hidden_states_of, load_decoder

BEAMS = {"greedy": 1, "beam3": 3, "beam5": 5}


class Case:
    """One oracle checkpoint with its inputs and the reference's outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.decoder = load_decoder(name)
        self.expected = expected_of(name)
        self.arrays = np.load(ORACLE / name / "expected.npz")
        self.prompts: list[list[int]] = self.expected["prompts"]
        self.hidden_states = hidden_states_of(name)

    def generate(self, rows: Sequence[int], num_beams: int, **options: Any) -> list[Generated]:
        """Captions some of the oracle's images in one batch."""
        given = {"max_new_tokens": 25, "length_penalty": 0.0, "eos_token_id": 13, "pad_token_id": 0, **options}
        prompts = [self.prompts[row] for row in rows]
        options = GenerationOptions(num_beams, **given)
        return [best for best, *_ in generate(self.decoder, self.hidden_states[list(rows)], prompts, options)]


@pytest.fixture(scope="module", params=ORACLES)
def case(request: pytest.FixtureRequest) -> Case:
    return cached_case(request.param)


@pytest.mark.parametrize("name", ["gpt2_r4", "gpt2_r1"])
def test_the_vision_encoder_is_the_references(name: str) -> None:
    case = cached_case(name)
    hidden_states = load_checkpoint(str(ORACLE / name)).encode_images(torch.tensor(case.arrays["pixel_values"]))
    assert hidden_states.shape == case.hidden_states.shape
    assert (hidden_states - case.hidden_states).abs().max() < 1e-4


def test_logits_are_the_references(case: Case) -> None:
    decoder = case.decoder
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


def test_the_last_position_alone_is_that_of_all(case: Case) -> None:
    decoder, prompts = case.decoder, case.prompts[:3]
    config = decoder.config
    ids, mask = pad_prompts(prompts, 0, torch.device("cpu"))
    positions, attention_mask = mask.cumsum(1).sub(1).clamp(min=0), additive_mask(causal_mask(mask), torch.float32)
    outputs, caches = [], []
    for last_only in (False, True):
        sizes = (config.num_layers, config.num_heads, config.head_dim)
        cache = KVCache(sizes, mask, num_beams=1, max_steps=1, dtype=torch.float32)
        with torch.inference_mode():
            cross_kv = decoder.cross_attention_kv(case.hidden_states[: len(prompts)])
            slots = PromptSlots(cache, slice(len(prompts)), ids.shape[1])
            outputs.append(decoder(ids, positions, attention_mask, cross_kv, slots, last_only))
        caches.append(cache)
    all_positions, last_position = outputs
    assert last_position.shape == (len(prompts), 1, config.hidden_size)
    assert (all_positions[:, -1:] - last_position).abs().max() < 1e-5 * all_positions.abs().max()
    filled = slice(ids.shape[1])
    assert torch.equal(caches[0].keys[:, :, :, filled], caches[1].keys[:, :, :, filled])
    assert torch.equal(caches[0].values[:, :, :, filled], caches[1].values[:, :, :, filled])


@pytest.mark.parametrize("name", BEAMS)
def test_token_ids_are_the_references_alone_and_in_one_batch(case: Case, name: str) -> None:
    together = case.generate(range(len(case.prompts)), BEAMS[name])
    assert [caption.token_ids for caption in together] == [expected[name] for expected in case.expected["cases"]]
    for row, expected in enumerate(case.expected["cases"]):
        (generated,) = case.generate([row], BEAMS[name])
        assert generated.token_ids == expected[name]
        if f"{name}_score" in expected:
            assert generated.score == pytest.approx(expected[f"{name}_score"], rel=3e-4, abs=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    oracle=st.sampled_from(ORACLES),
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    name=st.sampled_from(sorted(BEAMS)),
)
def test_token_ids_are_the_references_in_any_mix(oracle: str, rows: list[int], name: str) -> None:
    case = cached_case(oracle)
    generated = case.generate(rows, BEAMS[name])
    assert [caption.token_ids for caption in generated] == [case.expected["cases"][row][name] for row in rows]


@lru_cache
def cached_case(name: str) -> Case:
    """Loads an oracle once; hypothesis wants no fixtures of a function's scope."""
    return Case(name)


@lru_cache
def load_model() -> SmallCapModel:
    """Loads one whole oracle checkpoint."""
    return load_checkpoint(str(ORACLE / "gpt2_r4"))


@settings(max_examples=8, deadline=None)
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
    model = load_model()
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(len(lengths), 17, 64, generator=generator)
    prompts = [torch.randint(1, 600, (length,), generator=generator).tolist() for length in lengths]
    wanted = GenerationConfig(num_beams=num_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty)
    options = model.generation_options(wanted)
    together = model.generate(hidden_states, prompts, options)
    for row, prompt in enumerate(prompts):
        ((alone,),) = model.generate(hidden_states[row : row + 1], [prompt], options)
        assert together[row][0].token_ids == alone.token_ids
        assert together[row][0].score == pytest.approx(alone.score, abs=1e-3)
        assert len(alone.token_ids) <= max_new_tokens


def test_low_precision_runs(case: Case) -> None:
    decoder = load_decoder(case.name).bfloat16()
    options = GenerationOptions(3, 25, 0.0, 13, 0)
    generated = [best for (best,) in generate(decoder, case.hidden_states.bfloat16(), case.prompts, options)]
    assert all(1 <= len(caption.token_ids) <= 25 and np.isfinite(caption.score) for caption in generated)


def test_packed_weights_give_the_same_logits(case: Case) -> None:
    """Packing errs no more than bfloat16 does without it; both are measured against float32."""
    plain, packed = load_decoder(case.name).bfloat16(), load_decoder(case.name).bfloat16()
    packed.pack()
    if can_pack(plain):
        assert any(isinstance(module, PackedLinear) for module in packed.modules())
        assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    ids = torch.tensor([case.prompts[0]])
    logits = []
    for decoder in (case.decoder, plain, packed):
        dtype = next(decoder.parameters()).dtype
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=dtype)
        with torch.inference_mode():
            cross_kv = decoder.cross_attention_kv(case.hidden_states[:1].to(dtype))
            hidden = decoder(ids, torch.arange(ids.shape[1])[None], mask, cross_kv)
            logits.append(decoder.logits(hidden).float())
    exact, *rounded = logits
    plain_error, packed_error = ((values - exact).square().mean().sqrt() for values in rounded)
    assert packed_error <= 2**0.5 * plain_error  # twice the variance: as if every value were rounded once more


def test_no_prompts_give_nothing_and_those_that_do_not_fit_are_refused() -> None:
    model, hidden_states = load_model(), torch.zeros(1, 17, 64)
    assert model.generate(hidden_states[:0], []) == []
    with pytest.raises(ConfigError, match="one prompt per image"):
        model.generate(hidden_states, [[1], [2]])
    with pytest.raises(ConfigError, match="empty"):
        model.generate(hidden_states, [[]])
    seven, eight = (model.generation_options(GenerationConfig(max_new_tokens=count)) for count in (7, 8))
    model.generate(hidden_states, [[1] * 250], seven)  # 256 positions: the last token is never fed back
    with pytest.raises(ConfigError, match="256"):
        model.generate(hidden_states, [[1] * 250], eight)


def test_padding_is_on_the_left() -> None:
    ids, mask = pad_prompts([[5, 6, 7], [8]], pad_token_id=0, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
