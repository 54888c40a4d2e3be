"""Decoding on the pretended device: the CPU's tokens, few waits and shapes, one pool; and mutants that must be seen."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from smallcap.decoding import engine
from smallcap.decoding.beam_search import BeamSearch
from smallcap.decoding.engine import DecodingState, Generated
from smallcap.decoding.sampling import Sampling
from smallcap.decoding.strategy import GenerationOptions, SamplingOptions
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint
from tests.oracles import ORACLE, expected_of, hidden_states_of, load_decoder
from tests.pretended_cuda.checks import Mutation, check_waits, mutated

KINDS = ["gpt2_r4", "opt_r4", "xglm_r2"]  # an oracle for each kind of decoder
MAX_NEW_TOKENS = 7  # the first by prefill, the others by recordings of four steps and of two
CHECKS = 2  # for finished images, one before each recording
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3},
    "several captions": {"num_beams": 3, "num_captions": 3, "no_repeat_ngram_size": 2},
    "sampling": {
        "num_beams": 1,
        "strategy": Sampling,
        "num_captions": 2,
        "sampling": SamplingOptions(temperature=1.2, top_p=0.9, seed=3),
    },
}
# How often the host may wait in each function while one batch is decoded, and why it must.
WAITS = {
    "generate": (CHECKS, "which images are done decides what comes next"),
    "prefill": (3, "lengths, order and keys of the images are uploaded"),
    "pad_prompts": (2, "token ids and their mask are uploaded"),
    "DecodingState.take": (CHECKS, "the rows that stay are uploaded"),
    "_collect": (4 * (CHECKS + 1), "rows are uploaded; tokens, lengths and scores come back"),
}


def options_for(way: str, max_new_tokens: int = MAX_NEW_TOKENS) -> GenerationOptions:
    given = {"max_new_tokens": max_new_tokens, "length_penalty": 0.0, "eos_token_id": 13, "pad_token_id": 0}
    return GenerationOptions(**given, **WAYS[way])


def load_model(oracle: str) -> SmallCapModel:
    """Loads an oracle's decoder; the encoder beside it is not used."""
    model = load_checkpoint(str(ORACLE / "gpt2_r4"))
    model.decoder = load_decoder(oracle)
    return model


def generate(model: SmallCapModel, oracle: str, rows: range, way: str) -> list[list[Generated]]:
    prompts = [expected_of(oracle)["prompts"][row] for row in rows]
    hidden_states = hidden_states_of(oracle)[list(rows)].to(model.device)
    return model.generate(hidden_states, prompts, options_for(way), keys=list(rows))


@lru_cache
def captions_on_the_cpu(oracle: str, way: str, rows: range) -> list[list[Generated]]:
    return generate(load_model(oracle), oracle, rows, way)


def check_captions(mutation: Mutation | None = None, oracle: str = "gpt2_r4", way: str = "beams") -> None:
    """The captions are the CPU's; a second batch of the same shapes replays what the first one recorded."""
    batches = [range(5), range(3, 8)]
    expected = [captions_on_the_cpu(oracle, way, rows) for rows in batches]
    with mutated(mutation) as cuda:
        model = load_model(oracle).to("cuda")
        found = [generate(model, oracle, rows, way) for rows in batches]
        assert len(cuda.captures) >= CHECKS
        assert cuda.replays >= 2 * CHECKS - 1  # the last images may be done early
        assert not cuda.hazards
    for batch, expected_batch in zip(found, expected, strict=True):
        for captions, expected_captions in zip(batch, expected_batch, strict=True):
            same_tokens = [c.token_ids for c in captions] == [c.token_ids for c in expected_captions]
            same_scores = np.allclose([c.score for c in captions], [c.score for c in expected_captions], atol=1e-3)
            assert same_tokens and same_scores, f"not as on the CPU: {captions} instead of {expected_captions}"


def check_budget(mutation: Mutation | None = None) -> None:
    """No line lets the host wait more often than is reasoned in `WAITS`."""
    with mutated(mutation) as cuda:
        model = load_model("gpt2_r4").to("cuda")
        for batch in random_batches(2, sizes=(8, 8), seed=2):
            cuda.clear_events()
            model.generate(*batch, options_for("beams"))
        check_waits(cuda, WAITS, batches=1, place_of=lambda event: event.function)


def check_one_pool(mutation: Mutation | None = None) -> None:
    """All recordings share one pool and one stream, to which memory belongs, and each shape is recorded once."""
    with mutated(mutation) as cuda:
        model = load_model("gpt2_r4").to("cuda")
        for batch in random_batches(4, sizes=(8, 5, 3, 8), seed=1):
            model.generate(*batch, options_for("beams"))
        sizes_of_batches, windows = len({1, 2, 4, 8}), 2
        assert len({capture.pool for capture in cuda.captures}) == 1, "graphs do not share one pool"
        assert len({capture.stream for capture in cuda.captures}) == 1, "graphs do not share one stream"
        assert len(cuda.captures) <= sizes_of_batches * windows, "a shape was recorded again"


def check_few_shapes(mutation: Mutation | None = None) -> None:
    """Prompts of any length and batches of any size meet attention in few shapes: a GPU plans each one anew."""
    with mutated(mutation) as cuda:
        model = load_model("gpt2_r4").to("cuda")
        for batch in random_batches(12, sizes=range(1, 9), seed=0):
            model.generate(*batch, options_for("beams", max_new_tokens=1))
        sizes_of_batches, multiples_of_prompts, kinds = len({1, 2, 4, 8}), 1, 4  # self and cross; all or the last token
        assert len(cuda.attention_shapes) <= sizes_of_batches * multiples_of_prompts * kinds, "many shapes"


def random_batches(
    count: int, sizes: range | tuple[int, ...], seed: int
) -> Iterator[tuple[torch.Tensor, list[list[int]]]]:
    """Yields hidden states on the device, and prompts of 33 to 64 tokens."""
    rng = np.random.default_rng(seed)
    for _, size in zip(range(count), [*sizes] * count, strict=False):
        prompts = [rng.integers(20, 600, rng.integers(33, 65)).tolist() for _ in range(size)]
        yield torch.tensor(rng.standard_normal((size, 17, 64), np.float32)).to("cuda"), prompts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("oracle", KINDS)
def test_captions_are_the_cpus(oracle: str, way: str) -> None:
    check_captions(oracle=oracle, way=way)


def test_the_host_waits_where_it_must() -> None:
    check_budget()


def test_all_recordings_share_one_pool() -> None:
    check_one_pool()


def test_shapes_are_few() -> None:
    check_few_shapes()


# --- mutants


def advances(change: Callable[[BeamSearch, torch.Tensor], object]) -> Mutation:
    """A mutation that does something more in each step."""

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        advance = BeamSearch.advance

        def mutant(search: BeamSearch, logits: torch.Tensor) -> Any:
            change(search, logits)
            return advance(search, logits)

        monkeypatch.setattr(BeamSearch, "advance", mutant)

    return mutate


def add_a_cpu_tensor(search: BeamSearch, logits: torch.Tensor) -> None:
    search.scores = search.scores + torch.zeros(search.scores.shape[1])


def forget_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = DecodingState.changed_by_steps
    forgetful = lambda state: [tensor for tensor in changed(state) if tensor is not state.position]  # noqa: E731
    monkeypatch.setattr(DecodingState, "changed_by_steps", forgetful)


def forget_to_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded then starts after the warm-ups' steps."""
    from smallcap.decoding import cuda_graphs

    record = cuda_graphs.CudaRecorder.record
    monkeypatch.setattr(
        cuda_graphs.CudaRecorder, "record", lambda recorder, run, undo: record(recorder, run, lambda: None)
    )


def give_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torch.cuda.graph
    monkeypatch.setattr(
        torch.cuda, "graph", lambda recorded, pool=None, *a, **named: graph(recorded, None, *a, **named)
    )


def begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = SmallCapModel.generate

    def mutant(model: SmallCapModel, *arguments: Any) -> Any:
        model._graph_stepper = None
        return generate(model, *arguments)

    monkeypatch.setattr(SmallCapModel, "generate", mutant)


def pad_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    pad = engine.pad_prompts
    monkeypatch.setattr(engine, "pad_prompts", lambda prompts, token, device, *multiple: pad(prompts, token, device))


def wait_in_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = engine.causal_mask

    def mutant(token_mask: torch.Tensor) -> torch.Tensor:
        assert token_mask.any()
        return mask(token_mask)

    monkeypatch.setattr(engine, "causal_mask", mutant)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("mutation", "check", "message"),
    [
        (advances(lambda search, logits: search.done.all().item()), check_captions, "Inside a capture: value"),
        (advances(add_a_cpu_tensor), check_captions, "device"),
        (advances(lambda search, logits: torch.tensor([1.0], device=logits.device)), check_captions, "upload"),
        slow(forget_the_position, check_captions, "not as on the CPU"),
        (forget_to_undo, check_captions, "not as on the CPU"),
        (give_no_pool, check_one_pool, "one pool"),
        slow(begin_anew, check_one_pool, "one pool"),
        slow(pad_to_the_longest, check_few_shapes, "many shapes"),
        (wait_in_prefill, check_budget, r"nothing there needs one; .*test_decoding.py"),
    ],
    ids=[
        "an item in a step",
        "a CPU tensor in a step",
        "an upload in a step",
        "a changed tensor is not static",
        "warm-ups are not undone",
        "graphs without a pool",
        "a stepper for each batch",
        "prompts padded to the longest",
        "a wait in prefill",
    ],
)
def test_a_mutant_is_noticed(mutation: Mutation, check: Callable[[Mutation], None], message: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(mutation)
