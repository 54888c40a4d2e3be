"""What a process of a job shares with the job's other processes, and how it is heard by who reads the job's output.

The library alone has no others: what it shares stays in the process, and what it tells goes to Python's log. A job puts
its own `Colleagues` in that place.
"""

from __future__ import annotations

import logging

_log = logging.getLogger("smallcap")


class Colleagues:
    """Of a process that is alone."""

    def __init__(self) -> None:
        self._shared: dict[str, str] = {}

    def share(self, name: str, value: str) -> None:
        """Lets other processes of the job know a value; never fails."""
        self._shared[name] = value

    def recall(self, name: str) -> str | None:
        """Returns a value that a process of the job has shared; None where none has, or where it cannot be had."""
        return self._shared.get(name)

    def tell(self, topic: str, line: str) -> None:
        """Lets a person know; never fails.

        Args:
            topic: What the line is about: of several processes on a node, one is heard.
            line: The line.
        """
        _log.warning(line)


_present = [Colleagues()]


def colleagues() -> Colleagues:
    """Returns those of this process."""
    return _present[-1]


def work_with(others: Colleagues) -> None:
    """Sets those of this process, from now on; what was shared before stays."""
    others._shared |= _present[-1]._shared
    _present[-1] = others
