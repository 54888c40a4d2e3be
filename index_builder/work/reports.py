"""Lets a work item say how many of its rows are done, while it runs, to whatever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_told: ContextVar[Callable[[int], None] | None] = ContextVar("told", default=None)


def report_rows(rows: int) -> None:
    """Says how many rows of the item that this thread works at are done; nobody may listen."""
    tell = _told.get()
    if tell is not None:
        tell(rows)


@contextmanager
def rows_reported_to(tell: Callable[[int], None]) -> Iterator[None]:
    """Passes on what is reported in the block."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)
