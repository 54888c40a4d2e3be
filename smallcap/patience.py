"""Rides out storage that blinks: repeats what fails for a passing reason, with growing waits, for a time that is set.

Everything that is asked of storage is repeated here, except images, whose attempts `smallcap.images.fetching` counts;
it waits by the same rules once a place answers nothing any more. What no wait mends (a missing object, refused
credentials) is not repeated. Which faults pass, `smallcap.storage_faults` says.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

from smallcap.colleagues import colleagues
from smallcap.errors import RunError
from smallcap.phrasing import describe_duration
from smallcap.storage_faults import Fault, diagnose, this_node

DEFAULT_PATIENCE_S = 300.0
_VARIABLE = "SMALLCAP_STORAGE_PATIENCE_S"
_TOLD_AFTER_S = 10.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 15.0
_GIVEN_UP_S = 60.0  # after it has failed for good, a place is not waited for: a command that ends must not wait again

Result = TypeVar("Result")


def patience_s() -> float:
    """Returns for how many seconds storage that fails is asked again: what was set, here or for the job; or else what
    the environment says.
    """
    return float(colleagues().recall(_VARIABLE) or os.environ.get(_VARIABLE) or DEFAULT_PATIENCE_S)


def set_patience(seconds: float | None) -> None:
    """Sets it for this process, and for the others of its job; None for the default."""
    colleagues().share(_VARIABLE, "" if seconds is None else str(seconds))


def ride_out(uri: str, doing: str, attempt: Callable[[], Result]) -> Result:
    """Returns what `attempt` returns, after as many calls as it takes; see `Wait.repeat`."""
    return Wait(uri, doing).repeat(attempt)


def place_of(uri: str) -> str:
    """Returns the place of a URI, such as `s3://bucket`; a local path's is the file system's root."""
    scheme, separator, host_and_path = uri.partition("://")
    return f"{scheme.lower()}://{re.split('[/?#]', host_and_path, maxsplit=1)[0]}" if separator else "/"


class Wait:
    """The attempts at one operation, and the waits between them.

    Args:
        uri: What is to be read, written, listed or deleted.
        doing: What is done with it, such as `read this file`.
    """

    def __init__(self, uri: str, doing: str) -> None:
        self._uri, self._doing = uri, doing
        self._began = time.monotonic()
        self._failed_at: float | None = None  # first
        self._waits = 0
        self._is_told = False

    def repeat(self, attempt: Callable[[], Result]) -> Result:
        """Returns what `attempt` returns; calls it again where it fails for a passing reason.

        Raises:
            Exception: What the last call raised.
        """
        while True:
            try:
                result = attempt()
            except RunError:  # it was weighed and translated where it arose
                raise
            except Exception as error:
                fault = diagnose(error)
                if not self.goes_on(fault):
                    raise
                for seconds in self.pauses(fault):
                    time.sleep(seconds)
            else:
                self.end()
                return result

    def goes_on(self, fault: Fault) -> bool:
        """Says whether to try again after this fault; if not, the wait is over."""
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
        place = place_of(self._uri)
        lasts = now - self._failed_at < patience_s() and not _outages.is_given_up(place, now)
        if fault.passes and lasts:
            return True
        _outages.leave(place, self._is_told, now if fault.passes else None)
        self._is_told = False
        return False

    def pauses(self, fault: Fault) -> Iterator[float]:
        """Yields the seconds to sleep before the next attempt; between two pauses it tells that storage fails.

        The wait grows with each call. It is drawn, so that processes do not come back together.
        """
        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**self._waits)
        self._waits += 1
        left = random.uniform(longest / 2, longest)
        if not self._is_told:
            before = self._began + _TOLD_AFTER_S - time.monotonic()
            if before < left:
                if before > 0:
                    yield before
                    left -= before
                self._tell(fault)
        yield left

    def end(self) -> None:
        """Says that storage is back, where it was told to fail."""
        place = place_of(self._uri)
        _outages.note_answer(place)
        if self._is_told and _outages.end(place):
            waited = describe_duration(time.monotonic() - self._began)
            colleagues().tell(place, f"Storage answers again: {place}, on {this_node()} after {waited}.")
        self._is_told = False

    def describe(self) -> str:
        """Returns how long it was tried, for the end of a sentence; empty for a moment."""
        seconds = time.monotonic() - self._began
        return f", in every attempt for {describe_duration(seconds)}" if self._waits and seconds >= 1 else ""

    def _tell(self, fault: Fault) -> None:
        self._is_told = True
        now = time.monotonic()
        left = (self._failed_at or now) + patience_s() - now
        if _outages.begin(place_of(self._uri)):
            colleagues().tell(
                place_of(self._uri),
                f"Storage does not answer: cannot {self._doing} ({self._uri}), because {fault.describe()}. On "
                f"{this_node()}, waiting for {describe_duration(now - self._began)}; trying for "
                f"{describe_duration(left)} more (--storage-patience-s).",
            )


class _Outages:
    """Counts the waits of this process that are long enough to be told, by place: only the first and the end are."""

    def __init__(self) -> None:
        self._waits: Counter[str] = Counter()
        self._given_up: dict[str, float] = {}  # when, by place
        self._lock = threading.Lock()

    def begin(self, place: str) -> bool:
        """Counts a wait; says whether it is the place's first."""
        with self._lock:
            self._waits[place] += 1
            return self._waits[place] == 1

    def end(self, place: str) -> bool:
        """Forgets the waits of a place, which answers; says whether there was one."""
        with self._lock:
            return self._waits.pop(place, 0) > 0

    def note_answer(self, place: str) -> None:
        """Forgets that a place was given up."""
        self._given_up.pop(place, None)

    def is_given_up(self, place: str, now: float) -> bool:
        """Says whether a wait for a place has come to its end in vain a moment ago."""
        return place in self._given_up and now < self._given_up[place] + _GIVEN_UP_S

    def leave(self, place: str, is_told: bool, given_up_at: float | None) -> None:
        """Takes back one wait, which has come to its end in vain; `given_up_at` where only the time was too short."""
        with self._lock:
            if given_up_at is not None:
                self._given_up[place] = given_up_at
            if is_told and place in self._waits:
                self._waits[place] -= 1
                if not self._waits[place]:
                    del self._waits[place]


_outages = _Outages()
