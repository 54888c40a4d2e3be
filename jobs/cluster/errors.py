"""How a typed error of a worker reaches the driver, whatever ran there: a task, an actor, or an actor's constructor."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from smallcap.errors import SmallCapError


class GuardedActor:
    """An actor that is always made: an error of loading is raised by the first call.

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
        """Returns what `process` returns, or raises what `load` has raised."""
        self.check()
        return self.process(*arguments)

    def check(self) -> None:
        """Raises what `load` has raised; returns where that was nothing."""
        if self._failure is not None:
            raise self._failure


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raises a smallcap error of a task or an actor as itself, without the frames of Ray around it.

    Any other exception passes unchanged, but for the variables in Ray's frames. Either way the failed pipeline's actors
    end, and the next job of this process finds their CPUs free.
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
    """Ends the actors that an exception of Ray Data keeps alive, by emptying Ray's frames in its traceback.

    An actor ends when nothing refers to it. The variables of these frames do, as long as someone keeps the exception (a
    notebook or a debugger does), and after that until cycles are collected. The next pipeline, whose actors take all
    CPUs but one, would wait for a CPU to load with.
    """
    seen: set[int] = set()
    left: list[object] = [error]
    while left:
        exception = left.pop()
        if not isinstance(exception, BaseException) or id(exception) in seen:
            continue
        seen.add(id(exception))
        for found, _ in traceback.walk_tb(exception.__traceback__):
            frame: FrameType | None = found
            while frame is not None and frame.f_globals.get("__name__", "").startswith(("ray.", "threading")):
                with suppress(RuntimeError):  # it is still running
                    frame.clear()
                frame = frame.f_back  # down to the first of the pipeline's thread, which refers to all of it
        left += [getattr(exception, "cause", None), exception.__cause__, exception.__context__]
    gc.collect()


def _innermost_smallcap_error(error: BaseException | None) -> SmallCapError | None:
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None and isinstance(error, SmallCapError):  # the innermost: Ray's wrappers claim to be one as well
            return error
        error = cause
    return None
