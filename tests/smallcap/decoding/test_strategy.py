"""Top-k over chunks, the ban of repeated n-grams, sampling, and several captions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smallcap.config import GenerationConfig
from smallcap.decoding.beam_search import BeamSearch
from smallcap.decoding.sampling import draw, split_mix
from smallcap.decoding.strategy import GenerationOptions, SamplingOptions, top_logits
from smallcap.errors import ConfigError
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint
from tests.oracles import ORACLE, random_inputs


@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(6, 9000), k=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_top_logits_are_topk_and_logsumexp(vocab: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(17, 3, vocab, generator=generator)  # more rows than a CPU takes at once
    logits[0, 0, : vocab // 2] = -torch.inf
    values, indices, normaliser = top_logits(logits, k)
    expected = logits.topk(k, dim=-1)
    assert torch.equal(values, expected.values)
    assert torch.equal(logits.gather(-1, indices), values)
    assert all(len(set(row)) == k for row in indices.flatten(0, 1).tolist())
    assert torch.allclose(normaliser, logits.logsumexp(-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_said_twice(model: SmallCapModel, size: int) -> None:
    hidden_states, prompts = random_inputs(16)
    free = GenerationOptions(1, 40, 0.0, eos_token_id=-1, pad_token_id=0)  # without an end, captions come to repeat
    bound = replace(free, no_repeat_ngram_size=size)

    def repeats(options: GenerationOptions) -> int:
        said = [best.token_ids for (best,) in model.generate(hidden_states, prompts, options)]
        grams = [[tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)] for ids in said]
        return sum(len(caption) - len(set(caption)) for caption in grams)

    assert repeats(free) > 0  # or the ban would have nothing to do
    assert repeats(bound) == 0


def test_the_best_captions_are_the_beams_own_and_no_more_than_beams(model: SmallCapModel) -> None:
    hidden_states, prompts = random_inputs(5)
    best_only, several = (
        model.generate(hidden_states, prompts, model.generation_options(GenerationConfig(num_beams=4, num_captions=n)))
        for n in (1, 3)
    )
    for (best,), captions in zip(best_only, several, strict=True):
        assert captions[0] == best
        assert len({tuple(caption.token_ids) for caption in captions}) == 3
        assert [c.score for c in captions] == sorted((c.score for c in captions), reverse=True)
    with pytest.raises(ConfigError, match="more captions per image than beams"):
        model.generation_options(GenerationConfig(num_captions=64))  # the model's own number of beams
    assert model.generation_options(GenerationConfig(num_beams=2, num_captions=3, do_sample=True)).num_sequences == 3
    with pytest.raises(ValueError, match="need --do-sample"):
        GenerationConfig(top_p=0.9)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(6)), cut=st.integers(1, 5), seed=st.integers(0, 3))
def test_samples_do_not_depend_on_the_batch(order: list[int], cut: int, seed: int) -> None:
    model = load_checkpoint(str(ORACLE / "gpt2_r4"))
    hidden_states, prompts = random_inputs(6)
    options = model.generation_options(
        GenerationConfig(do_sample=True, temperature=1.2, top_p=0.9, num_captions=3, seed=seed, max_new_tokens=12)
    )
    keys = [1000 + row for row in range(6)]
    expected = model.generate(hidden_states, prompts, options, keys)
    found = {}
    for rows in (order[:cut], order[cut:]):
        captions = model.generate(hidden_states[rows], [prompts[r] for r in rows], options, [keys[r] for r in rows])
        found.update(zip(rows, captions, strict=True))
    for row in range(6):
        assert [caption.token_ids for caption in found[row]] == [caption.token_ids for caption in expected[row]]


def test_another_seed_or_image_draws_other_captions(model: SmallCapModel) -> None:
    hidden_states, prompts = random_inputs(1)

    def sample(seed: int, key: int) -> list[list[int]]:
        wanted = GenerationConfig(do_sample=True, num_captions=2, seed=seed)
        (captions,) = model.generate(hidden_states, prompts, model.generation_options(wanted), [key])
        return [caption.token_ids for caption in captions]

    assert sample(1, 7) == sample(1, 7)
    assert sample(1, 7) != sample(2, 7)
    assert sample(1, 7) != sample(1, 8)
    assert sample(1, 7)[0] != sample(1, 7)[1]


def test_a_sampled_captions_score_is_the_models_own(model: SmallCapModel) -> None:
    """Near zero temperature sampling is greedy, and its score must be the greedy one, untempered."""
    hidden_states, prompts = random_inputs(4)
    warm = model.generation_options(GenerationConfig(do_sample=True))
    cold = replace(warm, sampling=SamplingOptions(temperature=1e-4))
    greedy = model.generation_options(GenerationConfig(num_beams=1))
    sampled, searched = (model.generate(hidden_states, prompts, options) for options in (cold, greedy))
    for (a,), (b,) in zip(sampled, searched, strict=True):
        assert a.token_ids == b.token_ids
        assert a.score == pytest.approx(b.score, abs=1e-3)


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.1, 0.25, 0.15])
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    logits = probabilities.log().expand(len(uniform), -1)
    shares = torch.bincount(draw(logits, uniform, SamplingOptions()), minlength=4) / len(uniform)
    assert torch.allclose(shares, probabilities, atol=1e-3)
    nucleus = torch.bincount(draw(logits, uniform, SamplingOptions(top_p=0.7)), minlength=4) / len(uniform)
    assert torch.allclose(nucleus, torch.tensor([2 / 3, 0, 1 / 3, 0]), atol=1e-3)


def test_split_mix_is_the_published_one() -> None:
    """The first outputs for seed 1234567, as in Java's SplittableRandom and the public C code."""
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(split_mix(torch.tensor([state])).item() % 2**64)
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state -= 2**64 if state >= 2**63 else 0
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_beams_survive_a_ban_of_everything_but_a_few_tokens() -> None:
    options = GenerationOptions(2, 6, 0.0, eos_token_id=0, pad_token_id=0, no_repeat_ngram_size=1)
    search = BeamSearch(options, torch.zeros(1, dtype=torch.int64))
    logits = torch.randn(1, 1, 9)
    for _ in range(4):
        search.advance(logits)
        logits = torch.randn(1, 2, 9)
    assert torch.isfinite(search.best().scores).all()
