"""Decoding steps recorded once per shape as CUDA graphs and replayed: one launch instead of thousands.

A step is made of hundreds of small kernels, which a GPU finishes sooner than a CPU can launch them. What is recorded is
the same Python code that runs on a CPU. A recording holds several steps, for one batch size, one number of prompt
slots and one first step, since those decide the shapes and which slots are filled. Batches are filled up to a power of
two with copies of their last image. All recordings share one storage for keys and values, as only one batch is decoded
at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from smallcap.decoding.engine import DecodingState, step_eagerly
from smallcap.decoding.strategy import GenerationOptions
from smallcap.decoding.text_decoder import TextDecoder

STEPS_PER_GRAPH = 4
PROMPT_MULTIPLE = 32  # tokens
_WARM_UPS = 2  # eager runs before a recording: libraries allocate their workspaces in the first

Run = Callable[[], None]

_recording = threading.Lock()


@contextmanager
def no_recording() -> Iterator[None]:
    """Holds graph recordings back, in all threads, while the caller compiles or tunes kernels.

    Both wait for the whole device, which would break a recording that is under way.
    """
    with _recording:
        yield


@dataclass(frozen=True)
class _Shape:
    """The numbers that decide the tensors' sizes."""

    options: GenerationOptions
    batch: int  # a power of two
    slots: int  # T, of the cache
    encoder_positions: int  # P


class GraphStepper:
    """Advances decoding states by replaying recorded steps; for one model, and not thread-safe.

    Args:
        record: Records a function that only changes tensors in place, and returns its replay.
    """

    def __init__(self, record: Callable[[Run, Run], Run] | None = None) -> None:
        self._record = record or record_cuda_graph
        self._states: dict[_Shape, DecodingState] = {}
        self._replays: dict[tuple[_Shape, int, int], Run] = {}
        self._storage: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, decoder: TextDecoder, state: DecodingState, steps: int) -> DecodingState:
        """Advances a state by `steps` and returns it in the tensors that its shape's recordings use."""
        shape = _Shape(
            state.strategy.options,
            1 << (len(state.position) - 1).bit_length(),
            state.cache.keys.shape[3],
            state.cross_kv[0][0].shape[2],
        )
        static = self._static_state(shape, state)
        if static is not state:
            static.load(state)
        key = (shape, static.strategy.step, steps)
        if key not in self._replays:
            self._replays[key] = self._record_steps(decoder, static, steps)
        self._replays[key]()
        static.strategy.step += steps
        static.cache.length += steps * static.cache.num_beams
        return static

    def free(self) -> None:
        """Drops all recordings and their tensors; the next batches record anew."""
        self._states.clear()
        self._replays.clear()
        self._storage.clear()

    def _static_state(self, shape: _Shape, state: DecodingState) -> DecodingState:
        """Returns the state that the shape's recordings work on; the first one is made from `state`."""
        if shape not in self._states:
            last = len(state.position) - 1
            static = state.take([min(row, last) for row in range(shape.batch)])
            cache = static.cache
            cache.keys, cache.values = self._shared("keys", cache.keys), self._shared("values", cache.values)
            self._states[shape] = static
        return self._states[shape]

    def _shared(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor of the same shape in the shared storage, zeroed."""
        stored = self._storage.get((name, tensor.dtype))
        if stored is None or stored.numel() < tensor.numel():
            self._states.clear()  # they and their recordings use the storage that is now too small
            self._replays.clear()
            stored = self._storage[name, tensor.dtype] = torch.empty_like(tensor).flatten()
        return stored[: tensor.numel()].view(tensor.shape).zero_()

    def _record_steps(self, decoder: TextDecoder, static: DecodingState, steps: int) -> Run:
        def run() -> None:
            working = static.alias()
            step_eagerly(decoder, working, steps)
            for tensor, changed in zip(static.changed_by_steps(), working.changed_by_steps(), strict=True):
                tensor.copy_(changed)

        before = [tensor.clone() for tensor in static.changed_by_steps()]

        def undo() -> None:
            for tensor, saved in zip(static.changed_by_steps(), before, strict=True):
                tensor.copy_(saved)

        return self._record(run, undo)


def record_cuda_graph(run: Run, undo: Run) -> Run:
    """Records a function as a CUDA graph.

    Args:
        run: Changes tensors in place, on the current device and without waiting for it.
        undo: Reverts a run; the recording is preceded by runs that must leave no trace.

    Returns:
        A function that replays it.
    """
    with _recording:
        return _record_cuda_graph(run, undo)


def _record_cuda_graph(run: Run, undo: Run) -> Run:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
            undo()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread prepares the next batch
        run()
    return graph.replay
