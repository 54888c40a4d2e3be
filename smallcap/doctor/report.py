"""What a check reports: findings that are ok, a warning or a failure, with what was found and a remedy.

A check is a function that yields findings as it learns them. What it raises becomes a finding as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from smallcap.errors import SmallCapError
from smallcap.phrasing import one_line
from smallcap.storage_faults import brief

Status = Literal["ok", "warn", "fail"]

_LONGEST = 300  # characters of an error's details, each


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str  # what was looked at
    status: Status
    found: str
    remedy: str = ""  # empty only where all is well


def ok(subject: str, found: str) -> Finding:
    """Returns a finding that needs nothing."""
    return Finding(subject, "ok", found)


def warn(subject: str, found: str, remedy: str) -> Finding:
    """Returns a finding with which runs work, but slowly, or not in every case."""
    return Finding(subject, "warn", found, remedy)


def fail(subject: str, found: str, remedy: str) -> Finding:
    """Returns a finding with which a run would stop, or give wrong captions."""
    return Finding(subject, "fail", found, remedy)


def failed_by(subject: str, error: Exception, remedy: str) -> Finding:
    """Returns the finding that an exception makes; an error of smallcap says its own remedy, if it has one."""
    if isinstance(error, SmallCapError):
        named = (("at ", error.where), ("expected ", error.expected), ("found ", error.found))
        details = "; ".join(f"{name}{one_line(text, _LONGEST)}" for name, text in named if text)
        found = f"{error.what.rstrip('.')}: {details}" if details else error.what
        return fail(subject, found, error.remedy or remedy)
    return fail(subject, brief(error), remedy)


def attempt(subject: str, check: Callable[[], Iterable[Finding]], remedy: str) -> Iterator[Finding]:
    """Yields a check's findings, the last of which is what it raised, if it raised anything."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - whatever is broken here, the report goes on
        yield failed_by(subject, error, remedy)
