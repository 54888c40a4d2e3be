"""Brings a worker's typed error to the driver, whether a task, an actor or an actor's constructor raised it.

An actor's process that cannot go on is ended here, and begun again by Ray; `jobs.cluster.faults` decides how often.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

from jobs.cluster.faults import FaultGuardClient, kind_of
from jobs.cluster.memory_kills import IP, line_of_monitor
from jobs.cluster.stalls import StallWatch
from smallcap.errors import RunError, SmallCapError

_MORE_MEMORY = "Give the nodes more memory, or Ray fewer of their CPUs (ray start --num-cpus)."


class GuardedActor:
    """An actor whose constructor never fails: the first call raises an error of loading.

    Ray calls a failing constructor again and again, and its error reaches nobody. A subclass has `load`, which takes
    the constructor's arguments, and `process`, which takes those of a call and returns when its work is done. Several
    threads may call at the same time, if `process` allows it.

    Args:
        arguments: Those of `load`.
        faults: Counts faults. With it the actor ends its process when its GPU fails, when loading fails for a reason
            that may pass, and when a call stalls; Ray then starts it again and repeats the call. Without it such errors
            are raised as they are.
    """

    load: Callable[..., None]
    process: Callable[..., Any]
    _failure: SmallCapError | None = None
    _stall_watch: StallWatch | None = None

    def __init__(self, *arguments: Any, faults: FaultGuardClient | None = None) -> None:
        self._faults = faults
        try:
            self._failure = faults.begin_process() if faults else None
            if self._failure is None:
                self.load(*arguments)
        except SmallCapError as error:
            self._failure = error
        except Exception as error:
            if faults is None:
                raise
            self._failure = faults.end_by(kind_of(error) or "start", error)

    def __call__(self, *arguments: Any) -> Any:
        """Returns what `process` returns, or raises the error of `load`."""
        self.check()
        if self._faults is None:
            return self.process(*arguments)
        self._faults.begin_batch()
        try:
            with self._stall_watch.watch() if self._stall_watch else nullcontext():
                result = self.process(*arguments)
        except Exception as error:
            kind = None if isinstance(error, SmallCapError) else kind_of(error)
            if kind is None:
                raise
            self._failure = self._faults.end_by(kind, error)
            raise self._failure from None
        self._faults.end_batch()
        return result

    def check(self) -> None:
        """Raises the error of `load`, if there was one."""
        if self._failure is not None:
            raise self._failure

    def limit_stalls(self, timeout_s: float) -> None:
        """Ends the process, if its faults are counted, when a call shows no progress for so long; for `load`.

        Args:
            timeout_s: The most seconds between two signs of progress; the first may take three times as long.
        """
        if self._faults is not None:
            self._stall_watch = StallWatch(timeout_s, self._faults.end_stalled)

    def note_progress(self) -> None:
        """Says that a part of a call is done; for `process`."""
        if self._stall_watch is not None:
            self._stall_watch.note_progress()


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raises the smallcap error of a task or an actor without Ray's wrappers and frames.

    The death of an actor or a task that Ray does not start again becomes a `RunError`. Any other exception passes
    unchanged, except that variables in Ray's frames are cleared. In all cases the actors of the failed pipeline end, so
    that the next job of this process finds their CPUs free.
    """
    try:
        yield
    except Exception as error:
        _end_actors_kept_by(error)
        innermost = _innermost_smallcap_error(error) or _error_of_dead_actor(error) or _error_of_dead_task(error)
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


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what caused it, Ray's wrappers included, down to the innermost."""
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _innermost_smallcap_error(error: BaseException) -> SmallCapError | None:
    *_, innermost = causes(error)  # only that: Ray's wrappers are instances as well
    return innermost if isinstance(innermost, SmallCapError) else None


def _error_of_dead_actor(error: BaseException) -> RunError | None:
    """Returns what to raise for an actor that could not be made, for example because an import failed on its node."""
    from ray.exceptions import ActorDiedError

    dead = next((cause for cause in causes(error) if isinstance(cause, ActorDiedError)), None)
    if dead is None:
        return None
    message = str(dead).strip()
    memory = line_of_monitor(message)
    return _ended(
        f"An actor {'was ended because memory ran out' if memory else 'died'}, and Ray could not start it again.",
        message,
        memory or message.rpartition("\n")[2].strip(),
        _MORE_MEMORY if memory else "Ray's log of the actor on that node has the whole story.",
    )


def _error_of_dead_task(error: BaseException) -> RunError | None:
    """Returns what to raise for a task whose process was ended as often as Ray repeats it."""
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    dead = next((cause for cause in causes(error) if isinstance(cause, OutOfMemoryError | WorkerCrashedError)), None)
    if dead is None:
        return None
    message = str(dead).strip()
    no_memory = isinstance(dead, OutOfMemoryError)
    return _ended(
        f"A task was ended again and again{', each time because memory ran out' if no_memory else ''}.",
        message,
        line_of_monitor(message) or message.partition("\n")[0],
        _MORE_MEMORY if no_memory else "The logs of the kernel and of Ray on that node say why.",
    )


def _ended(said: str, message: str, found: str, remedy: str) -> RunError:
    """Returns the error of a process that Ray does not start any more; Ray's message names the node."""
    node = IP.search(message)
    where = f"node {node[1]}" if node else ""
    return RunError(said, where=where, found=found, remedy=f"{remedy} The same command continues the job.")
