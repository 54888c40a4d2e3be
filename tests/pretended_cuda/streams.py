"""Streams of the pretended device: everything runs at once, and what no wait has ordered is told as a hazard.

Each stream counts what it has launched, and knows up to which count of every other stream it has waited. Memory knows
which stream wrote it last and which have used it, so that a read that is not ordered after the write is seen, as is
memory that is freed while another stream may still use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

STREAMS_PER_PRIORITY = 32  # torch hands out the same ones again after that many


class Queue:
    """A stream of the driver, for which several of torch's `Stream` objects may stand."""

    def __init__(self, name: str, card: int) -> None:
        self.name, self.device = name, torch.device("cuda", card)
        self.launched = 0
        self.waited_for: dict[Queue, int] = {}

    def known(self) -> dict[Queue, int]:
        """Returns what is done when everything that has been launched here so far is done."""
        return self.waited_for | {self: self.launched}


def merge(known: dict[Queue, int], more: dict[Queue, int]) -> None:
    """Adds to what is known to be done, in place."""
    for queue, count in more.items():
        known[queue] = max(known.get(queue, 0), count)


class Memory:
    """One allocation of the device."""

    __slots__ = ("__weakref__", "bytes", "home", "kept_for", "order", "used", "writer")

    def __init__(self, order: Order, size: int, home: Queue) -> None:
        self.order, self.bytes, self.home = order, size, home
        self.writer, self.used = (home, 0), {home: 0}
        self.kept_for: set[Queue] = set()  # streams that `record_stream` named

    def __del__(self) -> None:
        self.order.free(self)


class Order:
    """What is known to be done before what.

    Args:
        total_bytes: Memory of all GPUs together.
        cards: Number of GPUs.
        report: Is told of each hazard.
    """

    def __init__(self, total_bytes: int, cards: int, report: Callable[[str], None]) -> None:
        self.total_bytes, self.allocated_bytes = total_bytes, 0
        self.defaults = [Queue("default stream", card) for card in range(cards)]
        self._report = report
        self._done: dict[Queue, int] = {}  # what the host has waited for
        # By GPU and priority, the one that was taken last at the end.
        self._pools: dict[tuple[int, int], list[Queue]] = {}

    def take_queue(self, card: int, priority: int) -> Queue:
        """Returns the next stream of a GPU and a priority, as torch does: they come round again."""
        pool = self._pools.setdefault((card, priority), [])
        is_full = len(pool) == STREAMS_PER_PRIORITY
        pool.append(pool.pop(0) if is_full else Queue(f"stream {len(pool)} of priority {priority}", card))
        return pool[-1]

    def allocate(self, size: int, queue: Queue) -> Memory:
        """Returns new memory that belongs to a stream.

        Raises:
            torch.OutOfMemoryError: The device has no room for it.
        """
        if self.allocated_bytes + size > self.total_bytes:
            free = self.total_bytes - self.allocated_bytes
            raise torch.OutOfMemoryError(f"CUDA out of memory. {size} bytes are wanted; the pretended GPU has {free}.")
        self.allocated_bytes += size
        return Memory(self, size, queue)

    def free(self, memory: Memory) -> None:
        """Gives memory back; its stream may use it again at once."""
        self.allocated_bytes -= memory.bytes
        for queue, count in memory.used.items():
            if queue not in memory.kept_for and not self._is_before(memory.home, queue, count):
                self._report(f"memory of the {memory.home.name} is freed while the {queue.name} may use it")

    def launch(self, queue: Queue, reads: Iterable[Memory], writes: Iterable[Memory]) -> None:
        """Runs an operation on a stream after all that the stream has waited for."""
        queue.launched += 1
        writes = list(writes)
        for memory in (*reads, *writes):
            writer, count = memory.writer
            if not self._is_before(queue, writer, count):
                self._report(f"the {queue.name} uses what the {writer.name} may not have written yet")
            memory.used[queue] = queue.launched
        for memory in writes:
            memory.writer = (queue, queue.launched)

    def wait_on_host(self, known: dict[Queue, int]) -> None:
        """Lets the host wait."""
        merge(self._done, known)

    def synchronize(self) -> None:
        """Lets the host wait for all streams."""
        for queue in [*self.defaults, *(queue for pool in self._pools.values() for queue in pool)]:
            merge(self._done, queue.known())

    def _is_before(self, queue: Queue, other: Queue, count: int) -> bool:
        """Tells whether what a stream launches now runs after another's launch of that count."""
        return queue is other or max(queue.waited_for.get(other, 0), self._done.get(other, 0)) >= count


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, cuda: Any, queue: Queue) -> None:
        self._cuda, self.queue = cuda, queue
        self.device = queue.device

    def wait_stream(self, other: Stream) -> None:
        merge(self.queue.waited_for, other.queue.known())

    def wait_event(self, event: Event) -> None:
        merge(self.queue.waited_for, event.known)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._cuda.note("synchronize")
        self._cuda.order.wait_on_host(self.queue.known())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.queue is other.queue

    def __hash__(self) -> int:
        return hash(self.queue)


class Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.known: dict[Queue, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.known = (stream or self._cuda.current_stream()).queue.known()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._cuda.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self._cuda.note("synchronize")
        self._cuda.order.wait_on_host(self.known)
