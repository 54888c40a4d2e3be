"""Notices that an actor's work has stopped: a thread beside it waits for signs of progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FIRST_BATCH = 3  # times the limit: it compiles, measures and records what later batches replay
_LOOKS = 20  # in the time of the limit


class StallWatch:
    """Calls a function when an actor has shown no progress for too long; time between calls does not count.

    The thread needs the interpreter's lock, which torch and faiss release while they compute or wait for a GPU.

    Args:
        timeout_s: The most seconds from one sign of progress to the next. The first one has three times as long.
        on_stall: Called in the watching thread.
    """

    def __init__(self, timeout_s: float, on_stall: Callable[[float], None]) -> None:
        self._timeout_s, self._on_stall = timeout_s, on_stall
        self._allowed_s = timeout_s * _FIRST_BATCH
        self._progressed_at = 0.0

    def note_progress(self) -> None:
        """Says that a part of the work is done."""
        self._allowed_s, self._progressed_at = self._timeout_s, time.monotonic()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watches while the block runs, whose end is progress as well."""
        ended = threading.Event()
        self._progressed_at = time.monotonic()
        threading.Thread(target=self._wait, args=(ended,), name="stall-watch", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
        self.note_progress()

    def _wait(self, ended: threading.Event) -> None:
        while not ended.wait(self._timeout_s / _LOOKS):
            allowed_s = self._allowed_s
            if time.monotonic() - self._progressed_at > allowed_s:
                self._on_stall(allowed_s)
                return
