"""Finds images that kill the process that decodes them, or keep it busy: they become error rows, not tried again.

The same holds for a tar or Parquet file whose reading kills its process.

`CrashGuard` is a plain class that remembers what was begun and never finished. Loading tasks ask it through a
`CrashGuardClient`; if the guard is lost, they decode unguarded. A `DecodeClock` ends a process from which a decoder
does not come back: nothing else stops one that is written in C.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

from jobs.cluster.side_actor import SideActor

Result = TypeVar("Result")

DECODE_LIMIT_S = 120.0  # of CPU time for one image: many times what the largest take
_BEGUN_IN_VAIN = 2  # how often a batch dies before its images are tried one by one
READ_IN_VAIN = 5
"""How often a step of reading a file dies before it is given up: nodes come and go, and a tar is thousands of rows."""
_LOOK_EVERY_S = 5.0
_ANSWER_S = 10.0


class CrashGuard:
    """Remembers the images, by fragment and row, that were begun and never finished."""

    def __init__(self) -> None:
        self._begun: Counter[tuple[int, int]] = Counter()  # how often each was begun and not cleared
        self._alone: set[tuple[int, int]] = set()  # those that were begun alone the last time
        self._crashed: set[tuple[int, int]] = set()
        self._too_slow: set[tuple[int, int]] = set()  # those of them that were given up

    def begin(self, fragment: int, rows: Sequence[int]) -> list[int]:
        """Marks rows as begun; to be called before they are decoded.

        Returns:
            The rows that must be left out because they killed the processes that tried them: they were begun at least
            twice without an end, and the last time alone. They are not marked, and no later `clear` acquits them: a
            batch that is repeated for another reason must not die again.
        """
        images = [(fragment, row) for row in rows]
        for image in images:
            in_vain = READ_IN_VAIN if image[1] < 0 else _BEGUN_IN_VAIN
            if image in self._alone and self._begun[image] >= in_vain:
                self._crashed.add(image)
                self._forget(image)
        begun = [image for image in images if image not in self._crashed]
        self._begun.update(begun)
        (self._alone.update if len(begun) == 1 else self._alone.difference_update)(begun)
        return [row for number, row in images if (number, row) in self._crashed]

    def is_suspicious(self, fragment: int, rows: Sequence[int]) -> bool:
        """Returns whether a batch was begun twice and never finished, so that its images must be tried one by one."""
        return any(self._begun[fragment, row] >= _BEGUN_IN_VAIN for row in rows)

    def clear(self, fragment: int, rows: Sequence[int]) -> None:
        """Forgets rows that were decoded, or that failed without killing their process."""
        for row in rows:
            self._forget((fragment, row))

    def give_up(self, fragment: int, row: int) -> None:
        """Lets `begin` leave out an image from now on, because it kept its process busy for too long."""
        self._too_slow.add((fragment, row))
        self._crashed.add((fragment, row))
        self._forget((fragment, row))

    def too_slow(self, fragment: int, rows: Sequence[int]) -> list[int]:
        """Returns those of the rows that were given up."""
        return [row for row in rows if (fragment, row) in self._too_slow]

    def _forget(self, image: tuple[int, int]) -> None:
        self._begun.pop(image, None)
        self._alone.discard(image)


class CrashGuardClient:
    """Lets a loading task call the guard; small and picklable.

    Args:
        actor: The actor of a `CrashGuard`.
    """

    def __init__(self, actor: SideActor) -> None:
        self._actor = actor

    def run_guarded(
        self, fragment: int, rows: Sequence[int], work: Callable[[list[int]], list[Result]]
    ) -> list[Result | None]:
        """Runs `work` on rows, one by one where a row may kill the process, and without rows that have done so.

        The calls of one process reach the guard in their order. So when the `begin` of a row is answered, the `clear`
        of the row before it, for which nobody waits, has been counted.

        Args:
            fragment: The rows' fragment.
            rows: The rows of one batch.
            work: A function that takes rows and returns a result for each.

        Returns:
            A result for each row; None for rows that were left out: `too_slow` ones, or else crashed.
        """
        results: dict[int, Result] = {}
        suspicious = self._actor.ask("is_suspicious", fragment, list(rows))
        for batch in [[row] for row in rows] if suspicious else [list(rows)]:
            left_out = self._actor.ask("begin", fragment, batch) or ()
            todo = [row for row in batch if row not in left_out]
            if todo:
                results |= zip(todo, work(todo), strict=True)
                self._actor.tell("clear", fragment, todo)
        return [results.get(row) for row in rows]

    def begin_reading(self, fragment: int, step: int) -> bool:
        """Marks a step of reading a fragment as begun; returns whether it killed the processes that tried it."""
        return bool(self._actor.ask("begin", fragment, [_reading(step)]))

    def end_reading(self, fragment: int, step: int) -> None:
        """Says that the step is done."""
        self._actor.tell("clear", fragment, [_reading(step)])

    def give_up(self, fragment: int, row: int) -> None:
        """Does what `CrashGuard.give_up` does, before this process ends."""
        self._actor.ask("give_up", fragment, row, timeout_s=_ANSWER_S)

    def too_slow(self, fragment: int, rows: Sequence[int]) -> list[int]:
        """Returns those of the rows that were given up."""
        return self._actor.ask("too_slow", fragment, list(rows)) or []


def _reading(step: int) -> int:
    """Returns the number by which the guard knows a step of reading: no row has it."""
    return -1 - step


def _end_process() -> None:
    os._exit(1)


class DecodeClock:
    """Ends this process when one image has kept it busy for too long; a thread looks at the clock, within a `with`.

    Args:
        give_up: A function that is called with the image's row before.
        limit_s: The process's CPU time in seconds that an image may take. A machine that is busy with others does not
            count against it.
        look_every_s: How often the thread looks, in seconds.
        end: What ends the process.
    """

    def __init__(
        self,
        give_up: Callable[[int], None],
        limit_s: float = DECODE_LIMIT_S,
        look_every_s: float = _LOOK_EVERY_S,
        end: Callable[[], None] = _end_process,
    ) -> None:
        self._give_up, self._limit_s, self._look_every_s, self._end = give_up, limit_s, look_every_s, end
        self._row: int | None = None
        self._began_s = 0.0
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="decode-clock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def begin(self, row: int | None) -> None:
        """Says that the image of a row is decoded from now on; None says that none is."""
        self._began_s = time.process_time()
        self._row = row

    def _watch(self) -> None:
        while not self._closed.wait(self._look_every_s):
            row, began_s = self._row, self._began_s
            if row is not None and time.process_time() - began_s > self._limit_s:
                self._give_up(row)
                self._end()
                return
