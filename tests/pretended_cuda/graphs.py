"""CUDA graphs of the pretended device: a capture only records, and a replay runs what was recorded on the same memory.

A capture computes, so that its tensors have shapes, and then puts back what it has overwritten and spoils what it has
made: nothing has run yet. A replay computes everything again from what the memory then holds, whatever Python has done
meanwhile. Memory that was there before the capture belongs to Python and must still exist.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.pretended_cuda.rules import leaves
from tests.pretended_cuda.streams import Memory, Stream

_SPOILT = 255  # every byte: floats are NaN, integers -1
_pools = itertools.count(1)


class CaptureError(RuntimeError):
    """What a capture must not do, or a replay cannot."""


def new_pool() -> tuple[int, int]:
    """Stands in for `torch.cuda.graph_pool_handle`."""
    return (0, next(_pools))


class Recording:
    """The operations of one capture, and the memory that they use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.operations: list[Callable[[], None]] = []
        self.made: set[Memory] = set()
        self.found: dict[Memory, Any] = weakref.WeakKeyDictionary()  # type: ignore[assignment]
        self.overwritten: set[weakref.ref[Memory]] = set()
        self._found = 0
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, used: list[Memory], written: list[tuple[Memory, Tensor]]) -> None:
        """Notes the memory of an operation that is about to run, and keeps what it will overwrite."""
        for memory in used:
            if memory not in self.made and memory not in self.found:
                self.found[memory] = None
                self._found += 1
        for memory, tensor in written:
            storage = tensor.untyped_storage()
            if memory not in self.made and storage.data_ptr() not in self._saved:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._saved[storage.data_ptr()] = (whole, whole.clone())
                self.overwritten.add(weakref.ref(memory))

    def add(self, compute: Callable[[], Any], result: Any, made: list[tuple[Memory, Tensor]]) -> None:
        """Adds an operation that has run."""
        outputs = [leaf for leaf in leaves([result]) if isinstance(leaf, Tensor)]
        for memory, tensor in made:
            self.made.add(memory)
            self._storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

        def again() -> None:
            for output, new in zip(outputs, leaves([compute()]), strict=True):
                if new is not output:  # it is where the operation overwrites an argument
                    output.copy_(new)

        self.operations.append(again)

    def end(self) -> None:
        """Leaves memory as if nothing had run."""
        for whole, saved in self._saved.values():
            whole.copy_(saved)
        self._saved.clear()
        for storage in self._storages.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(_SPOILT)
        self._storages.clear()

    def replay(self) -> None:
        """Runs the operations again.

        Raises:
            CaptureError: Memory that they use has been freed.
        """
        if len(self.found) < self._found:
            raise CaptureError(f"A replay uses {self._found - len(self.found)} tensors that have been freed.")
        with torch.inference_mode(), _disable_current_modes():
            for operation in self.operations:
                operation()


class CUDAGraph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._pool: Any = None
        self._recording: Recording | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        self._pool = pool or new_pool()
        self._recording = Recording(self._cuda.current_stream().device)
        self._cuda.begin_capture(self._recording, self._pool, capture_error_mode)

    def capture_end(self) -> None:
        assert self._recording is not None
        self._cuda.end_capture()
        with torch.inference_mode(), _disable_current_modes():
            self._recording.end()

    def replay(self) -> None:
        assert self._recording is not None, "nothing was captured"
        self._cuda.replay(self._recording)

    def pool(self) -> Any:
        return self._pool


@contextmanager
def capturing(
    cuda: Any,
    cuda_graph: CUDAGraph,
    pool: Any = None,
    stream: Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""
    pool = pool.pool() if isinstance(pool, CUDAGraph) else pool
    cuda.order.synchronize()
    with cuda.on_stream(stream or cuda.new_stream()):
        cuda_graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            cuda_graph.capture_end()
