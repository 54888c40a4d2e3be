"""A pretended GPU: tensors that say `cuda:0`, whose values are computed on the CPU under the rules of CUDA.

`with pretended_cuda() as cuda:` makes torch believe in it, or in several, in all threads that start meanwhile. It
notices

* tensors of different devices in one operation: it raises what torch raises on a GPU;
* work on another GPU than the one that captures, and every GPU that is used at all;
* each wait of the host and each upload, with its source line; inside a capture they raise;
* captures that read or write other memory than a replay finds (see `tests.pretended_cuda.graphs`);
* reads that no wait orders after their write on another stream (see `tests.pretended_cuda.streams`);
* more memory than it has.

It knows nothing of kernels, speed or a GPU's rounding. Code under test needs no change and is not patched; only torch
and the start of threads are.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretended_cuda.graphs import CaptureError, Recording
from tests.pretended_cuda.rules import aten, leaves, mapped, rule_of, signature_of, transfers_of
from tests.pretended_cuda.streams import Memory, Order, Queue, Stream

_ROOT = Path(__file__).parents[2]
_MODULES = ("backward", "device", "graphs", "rules", "streams", "torch_cuda")  # of this device
_NOT_OURS = (f"{_ROOT}/.venv/", *(str(Path(__file__).with_name(f"{name}.py")) for name in _MODULES))
WAITS = ("value", "download", "upload", "synchronize")  # kinds of events at which the host waits


@dataclass(frozen=True)
class Event:
    """Something that a GPU's user wants to know about, and the line of ours that caused it."""

    kind: str  # one of `WAITS`, `upload later`, `download later`, or a hazard
    thread: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.file}:{self.line} ({self.function}), thread {self.thread}"


@dataclass(frozen=True)
class Capture:
    """How a CUDA graph was captured."""

    pool: Any
    stream: Stream
    error_mode: str


class OnCuda(Tensor):
    """A tensor of the pretended device."""

    inner: Tensor  # the values
    memory: Memory

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory) -> OnCuda:
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=memory.home.device,
            )
        made.inner, made.memory = inner, memory
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} is called where no CUDA is pretended: in a thread that was there before?")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnCuda) else value


# Operations that the CPU lacks, or that only a GPU is asked for.
_ON_CPU = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.bmm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.cudnn_batch_norm.default: lambda *args: (
        *torch.native_batch_norm(*args[:8]),
        torch.empty(0, dtype=torch.uint8),
    ),
}


class PretendedCuda:
    """The device's state.

    Attributes:
        events: How often which line waited for the device or moved data.
        hazards: What streams do in an order that is not assured.
        captures: The CUDA graphs, in the order of their recording.
        replays: How often graphs were replayed.
        attention_shapes: How often attention met which shapes: query, key, and mask if there is one.
        threads: The threads that launched something, each with its streams. Libraries keep plans of kernels by thread.
        cards_used: Numbers of the GPUs on which something was launched, or for which memory was pinned: a process has
            a context on each, which takes hundreds of megabytes.
    """

    def __init__(self, total_bytes: int, cards: int) -> None:
        self.events: Counter[Event] = Counter()
        self.hazards: Counter[Event] = Counter()
        self.captures: list[Capture] = []
        self.replays = 0
        self.attention_shapes: Counter[tuple[tuple[int, ...], ...]] = Counter()
        self.threads: defaultdict[threading.Thread, set[Queue]] = defaultdict(set)
        self.cards_used: set[int] = set()
        self.order = Order(total_bytes, cards, self._report_hazard)
        self.is_pretended = True
        self._local = threading.local()
        self._capturing: dict[int, str] = {}  # threads, and what their captures forbid
        self._pinned: dict[int, Tensor] = {}

    # --- what happened

    def clear_events(self) -> None:
        """Forgets what happened so far."""
        self.events.clear()
        self.hazards.clear()

    def waits(self) -> Counter[Event]:
        """Returns the events at which the host waits."""
        return Counter({event: count for event, count in self.events.items() if event.kind in WAITS})

    def note(self, kind: str) -> None:
        """Counts an event.

        Raises:
            CaptureError: This thread captures, or another whose capture forbids it to all.
        """
        event = _event(kind)
        self.events[event] += 1
        if threading.get_ident() in self._capturing or "global" in self._capturing.values():
            raise CaptureError(f"Inside a capture: {event}.")

    def _report_hazard(self, what: str) -> None:
        if self.is_pretended:
            self.hazards[_event(what)] += 1

    # --- GPUs, streams and captures

    def current_device(self) -> int:
        """Returns the number of this thread's GPU."""
        return getattr(self._local, "card", 0)

    def set_device(self, device: Any) -> None:
        """Changes this thread's GPU."""
        self._local.card = self.card_of(device)

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        """Changes this thread's GPU for a while."""
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def card_of(self, device: Any) -> int:
        """Returns the number of a GPU; without one in `device`, that of this thread."""
        index = device if isinstance(device, int) else None if device is None else torch.device(device).index
        return self.current_device() if index is None else index

    def default_stream(self, device: Any = None) -> Stream:
        """Returns the stream of a GPU that threads have at first."""
        return Stream(self, self.order.defaults[self.card_of(device)])

    def new_stream(self, device: Any = None, priority: int = 0) -> Stream:
        """Returns a stream of a GPU."""
        return Stream(self, self.order.take_queue(self.card_of(device), priority))

    def current_stream(self, device: Any = None) -> Stream:
        """Returns this thread's stream on a GPU."""
        return self._streams().get(self.card_of(device)) or self.default_stream(device)

    def set_stream(self, stream: Stream) -> None:
        """Changes this thread's stream on a GPU, which becomes its GPU."""
        self._local.card = stream.device.index
        self._streams()[stream.device.index] = stream

    def _streams(self) -> dict[int, Stream]:
        return self._local.__dict__.setdefault("streams", {})

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        """Changes this thread's stream and GPU for a while; None leaves them."""
        if stream is None:
            yield
            return
        with self.on_device(stream.device):
            before = self.current_stream()
            self.set_stream(stream)
            try:
                yield
            finally:
                self.set_stream(before)

    def begin_capture(self, recording: Recording, pool: Any, error_mode: str) -> None:
        """Records what this thread does from now on."""
        self._capturing[threading.get_ident()] = error_mode
        self._local.recording = recording
        self.captures.append(Capture(pool, self.current_stream(), error_mode))

    def end_capture(self) -> None:
        """Ends this thread's recording."""
        del self._capturing[threading.get_ident()], self._local.recording

    def is_capturing(self) -> bool:
        """Tells whether this thread captures."""
        return threading.get_ident() in self._capturing

    def replay(self, recording: Recording) -> None:
        """Launches a recording."""
        self.replays += 1
        overwritten = [memory for ref in recording.overwritten if (memory := ref()) is not None]
        self.order.launch(self.current_stream(recording.device).queue, list(recording.found), overwritten)
        recording.replay()

    # --- pinned memory

    def pin(self, tensor: Tensor) -> Tensor:
        """Marks a CPU tensor's memory as pinned."""
        self.cards_used.add(self.current_device())
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Tells whether a CPU tensor lies in pinned memory."""
        return not tensor.is_cuda and tensor.untyped_storage().data_ptr() in self._pinned

    # --- operations

    @contextmanager
    def operations(self) -> Iterator[None]:
        """Catches this thread's operations."""
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(1, device="cuda")` is then a CPU tensor's upload
        try:
            with _Operations(self):
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation as CUDA would.

        Raises:
            RuntimeError: It mixes devices.
            CaptureError: It waits or uploads inside a capture.
        """
        given = leaves([*args, *kwargs.values()])
        if not any(isinstance(value, OnCuda) for value in given) and not any(
            isinstance(value, torch.device) and value.type == "cuda" for value in given
        ):
            pins = kwargs.get("pin_memory")
            result = func(*args, **kwargs | ({"pin_memory": False} if pins else {}))
            return self.pin(result) if pins else result
        if signature_of(func).is_composite:
            with _Operations(self):
                return func.decompose(*args, **kwargs)
        rule = rule_of(func, args, kwargs, given)
        for kind in (*transfers_of(func, args, kwargs), *(["value"] if rule.waits else [])):
            self.note(kind)
            if kind in WAITS:
                self.order.wait_on_host(self._queue_of(given).known())
        return self._compute(func, args, kwargs, given, rule.on_cuda)

    def _queue_of(self, given: list[Any]) -> Queue:
        """Returns where an operation with these arguments is launched: on the GPU it names, else on its tensors'."""
        named = [value for value in given if isinstance(value, torch.device) and value.type == "cuda"]
        return self.current_stream([*named, *(value.device for value in given if isinstance(value, OnCuda))][0]).queue

    def _compute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Any], on_cuda: bool
    ) -> Any:
        used = [value for value in given if isinstance(value, OnCuda)]
        inner_args = [mapped(_inner, value) for value in args]
        inner_kwargs = {name: mapped(_inner, value) for name, value in kwargs.items() if name != "pin_memory"}
        if inner_kwargs.get("device") is not None:
            inner_kwargs["device"] = torch.device("cpu")
        signature = signature_of(func)
        if signature.is_view:
            memory = used[0].memory
            return mapped(lambda value: OnCuda(value, memory), func(*inner_args, **inner_kwargs))

        queue = self._queue_of(given)
        self.threads[threading.current_thread()].add(queue)
        self.cards_used.add(queue.device.index)
        memories = [tensor.memory for tensor in used]
        written = [tensor for tensor in signature.written(args, kwargs) if isinstance(tensor, OnCuda)]
        recording: Recording | None = getattr(self._local, "recording", None)
        if recording is not None:
            if queue.device != recording.device:
                raise CaptureError(f"Inside a capture on {recording.device}: {func} on {queue.device}.")
            recording.before(memories, [(tensor.memory, tensor.inner) for tensor in written])
        compute = _ON_CPU.get(func, func)
        result = compute(*inner_args, **inner_kwargs)
        made: list[tuple[Memory, Tensor]] = []

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor) or not on_cuda:
                return value
            for tensor in written:
                if tensor.inner is value:
                    return tensor
            memory = self.order.allocate(value.untyped_storage().nbytes(), queue)
            made.append((memory, value))
            return OnCuda(value, memory)

        results = mapped(wrapped, result)
        if recording is not None:
            recording.add(lambda: compute(*inner_args, **inner_kwargs), result, made)
        else:
            self.order.launch(
                queue, memories, [*(tensor.memory for tensor in written), *(memory for memory, _ in made)]
            )
        if func is aten._to_copy.default and not on_cuda and kwargs.get("non_blocking"):
            self.pin(result)
        return results


class _Operations(TorchDispatchMode):
    def __init__(self, cuda: PretendedCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._cuda.run(func, args, kwargs or {})


def _event(kind: str) -> Event:
    """Returns an event at the innermost line of ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    code = frame.f_code
    file = code.co_filename.removeprefix(f"{_ROOT}/")
    function = code.co_qualname.partition(".<locals>")[0]
    return Event(kind, threading.current_thread().name.partition("_")[0], file, frame.f_lineno, function)


@cache
def _is_ours(file: str) -> bool:
    return file.startswith(f"{_ROOT}/") and not file.startswith(_NOT_OURS)
