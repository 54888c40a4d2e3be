"""Brings a worker's typed error to the driver, whether a task, an actor or an actor's constructor raised it."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from smallcap.errors import SmallCapError


class GuardedActor:
    """An actor whose constructor never fails: the first call raises an error of loading.

    Ray calls a failing constructor again and again, and its error reaches nobody. A subclass has `load`, which takes
    the constructor's arguments, and `process`, which takes those of a call.
    """

    load: Callable[..., None]
    process: Callable[..., Any]
    _failure: SmallCapError | None = None

    def __init__(self, *arguments: Any) -> None:
        try:
            self.load(*arguments)
        except SmallCapError as error:
            self._failure = error

    def __call__(self, *arguments: Any) -> Any:
        """Returns what `process` returns, or raises the error of `load`."""
        self.check()
        return self.process(*arguments)

    def check(self) -> None:
        """Raises the error of `load`, if there was one."""
        if self._failure is not None:
            raise self._failure


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raises the smallcap error of a task or an actor without Ray's wrappers and frames.

    Any other exception passes unchanged, except that variables in Ray's frames are cleared. In both cases the actors of
    the failed pipeline end, so that the next job of this process finds their CPUs free.
    """
    try:
        yield
    except Exception as error:
        _end_actors_kept_by(error)
        innermost = _innermost_smallcap_error(error)
        if innermost is None:
            raise
        raise innermost from None


def _end_actors_kept_by(error: BaseException) -> None:
    """Ends the actors that an exception of Ray Data keeps alive, by clearing Ray's frames in its traceback.

    An actor ends when nothing refers to it. The variables of these frames refer to it as long as someone keeps the
    exception (a notebook or a debugger does), and then until cycles are collected. The next pipeline, whose actors take
    all CPUs but one, would wait for a CPU to load with.
    """
    seen: set[int] = set()
    to_visit: list[object] = [error]
    while to_visit:
        exception = to_visit.pop()
        if not isinstance(exception, BaseException) or id(exception) in seen:
            continue
        seen.add(id(exception))
        for innermost, _ in traceback.walk_tb(exception.__traceback__):
            frame: FrameType | None = innermost
            while frame is not None and frame.f_globals.get("__name__", "").startswith(("ray.", "threading")):
                with suppress(RuntimeError):  # the frame is still running
                    frame.clear()
                frame = frame.f_back  # down to the first frame of the pipeline's thread, which refers to all of it
        to_visit += [getattr(exception, "cause", None), exception.__cause__, exception.__context__]
    gc.collect()


def _innermost_smallcap_error(error: BaseException | None) -> SmallCapError | None:
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None and isinstance(error, SmallCapError):  # the innermost: Ray's wrappers are instances as well
            return error
        error = cause
    return None
