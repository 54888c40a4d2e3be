"""Finds images that kill the process that decodes them: such an image becomes an error row, and is not tried forever.

`CrashGuard` is a plain class that remembers what was begun and never finished. Loading tasks ask it through a
`CrashGuardClient`; if the guard is lost, they decode unguarded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from jobs.cluster.side_actor import SideActor

Result = TypeVar("Result")

_BEGUN_IN_VAIN = 2  # how often a batch dies before its images are tried one by one


class CrashGuard:
    """Remembers the images, by fragment and row, that were begun and never finished."""

    def __init__(self) -> None:
        self._begun: Counter[tuple[int, int]] = Counter()  # how often each was begun and not cleared
        self._alone: set[tuple[int, int]] = set()  # those that were begun alone the last time
        self._crashed: set[tuple[int, int]] = set()

    def begin(self, fragment: int, rows: Sequence[int]) -> list[int]:
        """Marks rows as begun; to be called before they are decoded.

        Returns:
            The rows that must be left out because they killed the processes that tried them: they were begun at least
            twice without an end, and the last time alone. They are not marked, and no later `clear` acquits them: a
            batch that is repeated for another reason must not die again.
        """
        images = [(fragment, row) for row in rows]
        for image in images:
            if image in self._alone and self._begun[image] >= _BEGUN_IN_VAIN:
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
            A result for each row; None for rows that were left out, which are `crashed`.
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
