"""Recorded steps, replayed here by running them: static tensors, filled-up batches, shared storage and few shapes."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smallcap.config import GenerationConfig
from smallcap.decoding.cuda_graphs import GraphStepper, Run, no_recording
from smallcap.decoding.engine import DecodingState, Generated, generate
from smallcap.decoding.text_decoder import TextDecoder
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint
from tests.oracles import ORACLE, random_inputs


class Recorder:
    """Records nothing; a replay runs the function."""

    def __init__(self) -> None:
        self.recorded = self.forgotten = 0
        self.failing = False

    def record(self, run: Run, undo: Run) -> Run:
        self.recorded += 1
        run()
        if self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        undo()
        return run

    def forget(self) -> None:
        self.forgotten += 1


def assert_same(found: list[list[Generated]], expected: list[list[Generated]]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert [caption.token_ids for caption in a] == [caption.token_ids for caption in b]
        assert np.allclose([caption.score for caption in a], [caption.score for caption in b], atol=1e-3)


@pytest.mark.parametrize("wanted", [GenerationConfig(), GenerationConfig(do_sample=True, num_captions=2)])
def test_recorded_steps_give_the_same_captions(model: SmallCapModel, wanted: GenerationConfig) -> None:
    options = model.generation_options(wanted)
    recorder = Recorder()
    stepper = GraphStepper(recorder)
    for count, seed in ((5, 0), (11, 1), (3, 2), (5, 0)):  # the larger batch makes the storage grow
        given = (model.decoder, *random_inputs(count, seed), options)
        assert_same(generate(*given, stepper=stepper), generate(*given))
    recorded = recorder.recorded
    generate(*given, stepper=stepper)
    assert recorder.recorded == recorded, "a shape that was seen before must not be recorded again"


def test_batches_and_prompts_of_any_size_have_few_shapes(model: SmallCapModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one per power of two and per multiple of tokens, in prefill as in steps."""
    shapes: set[tuple[int, int]] = set()
    forward = TextDecoder.forward

    def noting(decoder: TextDecoder, input_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        shapes.add(tuple(input_ids.shape))
        return forward(decoder, input_ids, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(TextDecoder, "forward", noting)
    options = model.generation_options(GenerationConfig(num_beams=2, max_new_tokens=3))
    stepper = GraphStepper(Recorder())
    for count in (1, 2, 3, 5, 6, 11, 16, 17, 31):
        for longest in (9, 20, 40):
            generate(model.decoder, *random_inputs(count, count, longest), options, stepper=stepper)
    steps = {(rows, tokens) for rows, tokens in shapes if tokens == 2}
    assert steps <= {(1 << n, 2) for n in range(6)}
    assert shapes - steps <= {(1 << n, 16 * m) for n in range(6) for m in range(1, 4)}


def test_a_batch_is_copied_together_only_where_its_rows_become_fewer(
    model: SmallCapModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, int]] = []
    take = DecodingState.take

    def noting(state: DecodingState, rows: list[int]) -> DecodingState:
        taken.append((len(state.position), len(rows)))
        return take(state, rows)

    given = (model.decoder, *random_inputs(40), model.generation_options(GenerationConfig()))
    expected = generate(*given)
    stepper = GraphStepper(Recorder())
    generate(*given, stepper=stepper)  # which makes the static tensors
    monkeypatch.setattr(DecodingState, "take", noting)
    assert_same(generate(*given, stepper=stepper), expected)
    assert taken, "no batch became smaller"
    assert all(stepper.rows(after) < before for before, after in taken)


@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(1, 20),
    num_beams=st.integers(1, 4),
    max_new_tokens=st.integers(1, 14),
    sample=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_batch_is_that_of_eager_steps(
    count: int, num_beams: int, max_new_tokens: int, sample: bool, seed: int
) -> None:
    model = load_checkpoint(str(ORACLE / "gpt2_r4"))
    wanted = GenerationConfig(num_beams=num_beams, max_new_tokens=max_new_tokens, do_sample=sample)
    given = (model.decoder, *random_inputs(count, seed), model.generation_options(wanted))
    assert_same(generate(*given, stepper=GraphStepper(Recorder())), generate(*given))


def test_freed_memory_is_taken_anew(model: SmallCapModel) -> None:
    recorder = Recorder()
    stepper = GraphStepper(recorder)
    given = (model.decoder, *random_inputs(5), model.generation_options(GenerationConfig()))
    expected = generate(*given, stepper=stepper)
    recorded, forgotten = recorder.recorded, recorder.forgotten
    stepper.free()
    assert recorder.forgotten == forgotten + 1
    assert_same(generate(*given, stepper=stepper), expected)
    assert recorder.recorded == 2 * recorded


def test_a_recording_that_fails_leaves_nothing_behind(model: SmallCapModel) -> None:
    recorder = Recorder()
    stepper = GraphStepper(recorder)
    given = (model.decoder, *random_inputs(5), model.generation_options(GenerationConfig()))
    recorder.failing = True
    with pytest.raises(torch.OutOfMemoryError):
        generate(*given, stepper=stepper)
    forgotten = recorder.forgotten
    assert forgotten > 0
    recorder.failing = False
    assert_same(generate(*given, stepper=stepper), generate(*given))


def test_compiling_waits_for_recordings_and_they_for_it() -> None:
    order: list[str] = []

    def compile_kernels(name: str, then: Callable[[], object]) -> None:
        with no_recording():
            order.append(f"{name} begins")
            then()
            order.append(f"{name} ends")

    other = threading.Thread(target=compile_kernels, args=("second", list))
    compile_kernels("first", lambda: (other.start(), other.join(timeout=0.2)))
    other.join()
    assert order == ["first begins", "first ends", "second begins", "second ends"]
