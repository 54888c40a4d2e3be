"""Runs checks in another process, which may hang, crash, or lose its GPU without harm to the report.

A library that is broken can end its process (a wrong instruction, a failed assertion in C++), and a service that does
not answer can hold a thread for hours. Neither can be caught within the process. A CUDA error stays with its process.
Importing torch takes seconds, so a process runs one check after the other; when one fails in it, it is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pkgutil import resolve_name
from typing import IO, Any, Self

from smallcap.doctor.report import Finding, attempt, fail
from smallcap.patience import set_patience

PATIENCE_S = 10.0  # without a word of what goes on
_END_S = 20.0  # for a process that has lost its connection
_PRINTED_BYTES = 1 << 16  # of which the last line is shown


@dataclass(frozen=True)
class Check:
    """One check and the time that it may take."""

    subject: str
    run: str  # `module:function`, imported in the check's process; the function yields findings
    arguments: tuple[Any, ...]
    limit_s: float  # seconds from one finding to the next
    remedy: str  # where it hangs, crashes, or raises what has no remedy of its own
    needs: tuple[str, ...] = ()  # subjects of checks without which this one says nothing
    is_alone: bool = False  # in a process that runs no other check


class Isolation:
    """Runs checks outside of this process.

    Args:
        on_wait: Called with the seconds since the last finding whenever `patience_s` have passed without one.
        patience_s: Seconds.
    """

    def __init__(self, on_wait: Callable[[Check, float], None], patience_s: float = PATIENCE_S) -> None:
        self._on_wait, self._patience_s = on_wait, patience_s
        self._kept: _Process | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept is not None:
            self._kept.end()

    def run(self, check: Check) -> Iterator[Finding]:
        """Yields a check's findings as they come; always ends, with a failure if the check does not."""
        process, is_sound = _Process() if check.is_alone else self._take(), True
        try:
            for finding in self._findings(process, check):
                is_sound = is_sound and finding.status != "fail"
                yield finding
        except BaseException:  # also where nobody wants more findings
            process.end()
            raise
        if is_sound and not check.is_alone:
            self._kept = process
        else:
            process.end()

    def _take(self) -> _Process:
        kept, self._kept = self._kept, None
        return kept if kept is not None and kept.is_alive() else _Process()

    def _findings(self, process: _Process, check: Check) -> Iterator[Finding]:
        process.begin(check)
        since = time.monotonic()
        while True:
            waited = time.monotonic() - since
            if waited >= check.limit_s:
                yield fail(check.subject, f"no answer within {check.limit_s:.0f} s", check.remedy)
                return
            if process.poll(min(self._patience_s, check.limit_s - waited)):
                try:
                    finding = process.next_finding()
                except (EOFError, OSError):
                    yield fail(check.subject, process.describe_end(), check.remedy)
                    return
                if finding is None:
                    return
                yield finding
                since = time.monotonic()
            elif time.monotonic() - since < check.limit_s:
                self._on_wait(check, time.monotonic() - since)


class _Process:
    """A process that runs checks, seen from outside."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # In memory where that is possible: a machine may have no folder for temporary files, which a check will say.
        on_linux = sys.platform == "linux"
        self._printed: IO[bytes] = (
            os.fdopen(os.memfd_create("printed"), "w+b") if on_linux else tempfile.TemporaryFile()  # noqa: SIM115
        )
        self._seen_bytes = 0
        with Connection(os.dup(self._printed.fileno())) as printed:  # as such it can be handed to the process
            self._process = context.Process(target=_run_checks, args=(theirs, printed), daemon=True)
            self._process.start()
        theirs.close()  # the end of the process is then the end of the connection

    def begin(self, check: Check) -> None:
        self._seen_bytes = os.fstat(self._printed.fileno()).st_size
        with suppress(OSError):  # that the process has ended is told where findings are received
            self._connection.send(check)

    def poll(self, seconds: float) -> bool:
        return self._connection.poll(seconds)

    def next_finding(self) -> Finding | None:
        """Returns a finding, or None where there are no more.

        Raises:
            EOFError, OSError: The process has ended.
        """
        finding: Finding | None = self._connection.recv()
        return finding

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def describe_end(self) -> str:
        self._process.join(_END_S)
        code = self._process.exitcode
        if code is None:
            how = "losing its connection"
        elif code >= 0:
            how = f"exit code {code}"
        else:
            how = f"signal {signal.Signals(-code).name if -code in {*signal.Signals} else -code}"
        size = os.fstat(self._printed.fileno()).st_size
        start = max(self._seen_bytes, size - _PRINTED_BYTES)
        lines = os.pread(self._printed.fileno(), size - start, start).decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"its process ended by {how}" + (f"; it had printed: {last[:300]}" if last else "")

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._printed.close()


def _run_checks(connection: Connection, printed: Connection) -> None:
    """Is the process: what it prints goes to a file, and what it finds to the other end of the connection."""
    for stream in (1, 2):
        os.dup2(printed.fileno(), stream)
    set_patience(0)  # a storage that fails is to be told
    while True:
        try:
            check: Check = connection.recv()
        except EOFError:
            return
        for finding in attempt(check.subject, lambda: resolve_name(check.run)(*check.arguments), check.remedy):  # noqa: B023
            connection.send(finding)
        connection.send(None)
