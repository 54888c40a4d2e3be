"""Stops a job when it is asked to: one Ctrl-C or SIGTERM keeps what is done, a second one leaves at once.

The signal raises `KeyboardInterrupt` in the main thread, which Ray's calls let through; anything else that a handler
raises ends in Ray's C++ side as an abort. `stoppable` turns it into `Stopped`, whose text says what is kept.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from jobs.screen import say_failure, tell, write_at

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; `kill`, `ray job stop` and schedulers
GOES_ON = "the same command goes on"
_SAME_REQUEST_S = 0.3  # a terminal and a launcher such as make may both pass one Ctrl-C on


class Stopped(BaseException):
    """A signal has stopped a job; what it had done is kept.

    It is no `Exception`: whoever retries or counts failures must not take it for one.

    Args:
        message: What is kept and how the job goes on, for people.
        number: The signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_status(self) -> int:
        """What shells and schedulers know a process by that a signal has ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class StopSignals:
    """The handlers of one job; the first signal raises `KeyboardInterrupt` in the main thread."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal, once there was one
        self._asked_at = 0.0

    def arm(self) -> None:
        """Takes the signals over; to be called again after Ray, which handles SIGTERM itself, has been connected."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def stopped(self, message: str) -> Stopped:
        """Returns the exception that says what is kept."""
        return Stopped(message, self.number or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._asked_at = number, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._asked_at > _SAME_REQUEST_S:
            write_at(2, "\nLeft at once.")
            _end_at_once(number)


@contextmanager
def stoppable(kept: str = GOES_ON) -> Iterator[StopSignals]:
    """Lets signals stop the block.

    Args:
        kept: What to tell who has stopped it, where the block does not say more.

    Raises:
        Stopped: A signal came.
    """
    signals = StopSignals()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signals.arm()
    try:
        yield signals
    except KeyboardInterrupt:
        raise signals.stopped(f"Stopped: {kept}") from None
    except SystemExit as left:
        if left.code != signal.SIGTERM:  # what Ray makes of it while it connects
            raise
        raise Stopped(f"Stopped: {kept}", signal.SIGTERM) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave(stopped: Stopped) -> None:
    """Tells why a command ends early, and ends the process; a signal that comes while it ends does so at once."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _end_at_once(number))
    tell(str(stopped))
    say_failure(stopped, stopped.exit_status)
    sys.exit(stopped.exit_status)


def _end_at_once(number: int) -> NoReturn:
    """Ends this process and its local Ray's; a worker that had just begun would look for its head for a minute."""
    with suppress(ImportError):  # Ray brings it along; without Ray there are no such processes
        import psutil  # type: ignore[import-untyped]

        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
    os._exit(128 + number)
