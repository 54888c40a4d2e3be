"""Decoding steps recorded once per shape as CUDA graphs and replayed: one launch instead of thousands.

A step is made of hundreds of small kernels, which a GPU finishes sooner than a CPU can launch them. What is recorded is
the same Python code that runs on a CPU. A recording holds several steps, for one batch size, one number of prompt
slots and one first step, since those decide the shapes and which slots are filled. Few shapes occur, in prefill as
well: batches are filled up to a power of two with copies of their last image, and prompts to a multiple of some tokens.

Only one batch is decoded at a time. All recordings therefore share one storage for keys and values, and one pool for
what steps allocate: a recording copies its results into tensors outside the pool before another one runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from smallcap.decoding.engine import ALL_TOKENS, EAGER, DecodingState
from smallcap.decoding.strategy import GenerationOptions
from smallcap.decoding.text_decoder import TextDecoder
from smallcap.machine.shapes import rows_on_gpu, tokens_on_gpu

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


class Recorder(Protocol):
    """Records functions."""

    def record(self, run: Run, undo: Run) -> Run:
        """Records a function.

        Args:
            run: Changes tensors in place, without waiting for the device.
            undo: Reverts a run; the recording may be preceded by runs, which must leave no trace.

        Returns:
            A function that replays it.
        """

    def forget(self) -> None:
        """Is told that all its recordings are gone."""


class GraphStepper:
    """Advances decoding states by replaying recorded steps; for one model, and not thread-safe.

    Args:
        recorder: Records the steps; by default as CUDA graphs.
    """

    steps_per_check = 4  # steps of a recording
    prefill_tokens = ALL_TOKENS

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder or CudaRecorder()
        self._states: dict[_Shape, DecodingState] = {}
        self._replays: dict[tuple[_Shape, int, int], Run] = {}
        self._storage: dict[tuple[str, torch.dtype], Tensor] = {}

    def rows(self, images: int) -> int:
        """Returns the least power of two that is not below the number of images."""
        return rows_on_gpu(images)

    def slots(self, tokens: int) -> int:
        """Returns the next multiple of some tokens."""
        return tokens_on_gpu(tokens)

    def advance(self, decoder: TextDecoder, state: DecodingState, steps: int) -> DecodingState:
        """Advances a state by `steps` and returns it in the tensors that its shape's recordings use."""
        shape = _Shape(
            state.strategy.options,
            self.rows(len(state.position)),
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
        self._drop_recordings()
        self._storage.clear()

    def _static_state(self, shape: _Shape, state: DecodingState) -> DecodingState:
        """Returns the state that the shape's recordings work on; the first one is made like `state`."""
        if shape not in self._states:
            small = state.alias()  # without keys and values, which are not copied but lie in the shared storage
            small.cache.keys = small.cache.values = state.cache.keys[:, :, :, :0]
            small.cross_kv = []
            static = small.take([0] * shape.batch)
            cache = state.cache
            static.cache.keys = self._shared("keys", cache.keys, 1, shape.batch)
            static.cache.values = self._shared("values", cache.values, 1, shape.batch)
            static.cross_kv = [
                (
                    self._shared(f"cross-attention keys {layer}", keys, 0, shape.batch),
                    self._shared(f"cross-attention values {layer}", values, 0, shape.batch),
                )
                for layer, (keys, values) in enumerate(state.cross_kv)
            ]
            self._states[shape] = static
        return self._states[shape]

    def _shared(self, name: str, like: Tensor, batch_dim: int, batch: int) -> Tensor:
        """Returns a tensor in the shared storage, zeroed, of the shape of another but for the size of the batch."""
        shape = [*like.shape[:batch_dim], batch, *like.shape[batch_dim + 1 :]]
        size = torch.Size(shape).numel()
        if (name, like.dtype) not in self._storage or self._storage[name, like.dtype].numel() < size:
            self._drop_recordings()  # they use the storage that is now too small
            self._storage.pop((name, like.dtype), None)  # before there is a larger one
            self._storage[name, like.dtype] = like.new_empty(size)
        return self._storage[name, like.dtype][:size].view(shape).zero_()

    def _drop_recordings(self) -> None:
        self._states.clear()
        self._replays.clear()
        self._recorder.forget()

    def _record_steps(self, decoder: TextDecoder, static: DecodingState, steps: int) -> Run:
        def run() -> None:
            working = static.alias()
            EAGER.advance(decoder, working, steps)
            for tensor, changed in zip(static.changed_by_steps(), working.changed_by_steps(), strict=True):
                tensor.copy_(changed)

        before = [tensor.clone() for tensor in static.changed_by_steps()]

        def undo() -> None:
            for tensor, saved in zip(static.changed_by_steps(), before, strict=True):
                tensor.copy_(saved)

        try:
            return self._recorder.record(run, undo)
        except BaseException:
            self.free()  # the state is between two steps
            raise


class CudaRecorder:
    """Records CUDA graphs on the current device, on one stream and in one pool of memory.

    What a library allocates in a warm-up belongs to the stream, and so does what a pool holds.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def record(self, run: Run, undo: Run) -> Run:
        """Records a function as a graph; see `Recorder.record`."""
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with _recording:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
                    undo()
            current.wait_stream(self._stream)
            # Only this thread's calls can break the recording: another thread prepares the next batch.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                run()
        return graph.replay

    def forget(self) -> None:
        """Leaves the pool, which ends with its last graph."""
        self._pool = None
