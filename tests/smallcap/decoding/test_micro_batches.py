"""Batches whose memory runs out."""

import platform
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from smallcap.config import GenerationConfig
from smallcap.decoding.micro_batches import MicroBatches, is_out_of_memory
from smallcap.errors import RunError
from smallcap.model.checkpoint import load_checkpoint
from tests.oracles import ORACLE


def micro_batches_of(free: Callable[[], None]) -> MicroBatches:
    return MicroBatches("the step", free, relief="Use fewer beams")


def joined(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [row for part in parts for row in part]


class Device:
    """Runs rows as long as they fit, and notes their number."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        self.room, self.sizes, self.freed = room, list[int](), 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def run(self, rows: slice) -> list[int]:
        self.sizes.append(rows.stop - rows.start)
        if self.sizes[-1] > self.room:
            raise self.error
        return list(range(rows.start, rows.stop))

    def free(self) -> None:
        self.freed += 1


def test_a_batch_is_halved_until_it_fits_and_the_size_is_remembered() -> None:
    device = Device(room=40)
    micro_batches = micro_batches_of(device.free)
    assert joined(micro_batches.run(200, device.run)) == list(range(200))
    assert device.sizes == [200, 128, 64, 32, 32, 32, 32, 32, 32, 8]
    assert (device.freed, micro_batches.limit) == (3, 32)
    assert joined(micro_batches.run(40, device.run)) == list(range(40))
    assert device.sizes[-2:] == [32, 8]


def test_rows_that_are_done_are_not_run_again() -> None:
    starts: list[int] = []

    def run(rows: slice) -> list[int]:
        starts.append(rows.start)
        if rows.start == 4 and rows.stop > 6:  # another process takes memory in the middle of the batch
            raise torch.OutOfMemoryError
        return list(range(rows.start, rows.stop))

    micro_batches = micro_batches_of(lambda: None)
    micro_batches.limit = 4
    assert micro_batches.run(8, run) == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert starts == [0, 4, 4, 6]


def test_a_batch_of_nothing_runs_nothing() -> None:
    device = Device(room=1)
    assert micro_batches_of(device.free).run(0, device.run) == []
    assert device.sizes == []


def test_one_image_that_does_not_fit_stops_the_run() -> None:
    device = Device(room=0)
    with pytest.raises(RunError, match="one image") as raised:
        micro_batches_of(device.free).run(4, device.run)
    assert raised.value.where == f"the step, on {platform.node()}"
    assert raised.value.found == "CUDA out of memory. Tried to allocate 2 GiB."
    assert raised.value.remedy == "Use fewer beams, or end what else runs on the GPU."
    assert device.sizes == [4, 2, 1, 1]


def test_one_image_gets_the_memory_that_was_only_kept() -> None:
    kept = [True]

    def run(rows: slice) -> list[int]:
        if kept[0]:
            raise torch.OutOfMemoryError
        return [rows.start]

    assert micro_batches_of(lambda: kept.__setitem__(0, False)).run(1, run) == [[0]]


def test_other_errors_pass() -> None:
    device = Device(room=0, error=RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        micro_batches_of(device.free).run(4, device.run)
    assert (device.sizes, device.freed) == ([4], 0)


def test_libraries_own_errors_and_those_of_a_broken_capture_are_recognised() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(ValueError("out of memory"))
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert is_out_of_memory(error)


def test_the_failed_attempts_tensors_are_gone_before_memory_is_freed() -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def run(rows: slice) -> list[int]:
        tensor = torch.zeros(rows.stop - rows.start)
        tensors.append(weakref.ref(tensor))
        if len(tensor) > 1:
            raise torch.OutOfMemoryError
        return [0] * len(tensor)

    micro_batches_of(lambda: alive.append(sum(tensor() is not None for tensor in tensors))).run(4, run)
    assert alive == [0, 0]


@pytest.mark.parametrize("sample", [False, True])
def test_captions_in_parts_are_those_of_the_whole(sample: bool) -> None:
    model = load_checkpoint(str(ORACLE / "gpt2_r4"))
    options = model.generation_options(GenerationConfig(do_sample=sample, max_new_tokens=8, num_captions=2, seed=7))
    hidden_states = torch.randn(11, 17, 64, generator=torch.Generator().manual_seed(3))
    prompts = [[5 + row, 9, 2 * row + 1][: 1 + row % 3] for row in range(11)]
    keys = [row * 1_000_003 for row in range(11)]

    def run(rows: slice) -> list[list[list[int]]]:
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError
        generated = model.generate(hidden_states[rows], prompts[rows], options, keys[rows])
        return [[caption.token_ids for caption in captions] for captions in generated]

    whole = model.generate(hidden_states, prompts, options, keys)
    assert joined(micro_batches_of(lambda: None).run(11, run)) == [
        [c.token_ids for c in captions] for captions in whole
    ]
