"""Runs a check in a process of its own, which may hang, crash, or lose its GPU without harm to the others.

A library that is broken can end its process (a wrong instruction, a failed assertion in C++), and a service that does
not answer can hold a thread for hours. Neither can be caught within the process. A CUDA error stays with its process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from smallcap.doctor.report import Finding, attempt, fail

PATIENCE_S = 10.0  # without a word of what goes on
_END_S = 20.0  # for a process that has reported all


@dataclass(frozen=True)
class Check:
    """One check and the time that it may take."""

    subject: str
    run: str  # `module:function`, imported in the check's process; the function yields findings
    arguments: tuple[Any, ...]
    limit_s: float  # seconds from one finding to the next
    remedy: str  # where it hangs, crashes, or raises what has no remedy of its own
    needs: str = ""  # subject of a check without which this one says nothing


def run_check(
    check: Check, on_wait: Callable[[Check, float], None], patience_s: float = PATIENCE_S
) -> Iterator[Finding]:
    """Yields a check's findings as they come; always ends, with a failure if the check does not.

    Args:
        check: The check.
        on_wait: Called with the seconds since the last finding whenever `patience_s` have passed without one.
        patience_s: Seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="smallcap-") as folder:
        printed = Path(folder, "printed")
        process = context.Process(target=_report_to, args=(sender, check, str(printed)), daemon=True)
        process.start()
        sender.close()  # the end of the process is then the end of what is received
        try:
            since = time.monotonic()
            while True:
                waited = time.monotonic() - since
                if waited >= check.limit_s:
                    yield fail(check.subject, f"no answer within {check.limit_s:.0f} s", check.remedy)
                    return
                if receiver.poll(min(patience_s, check.limit_s - waited)):
                    finding = _received(receiver)
                    if finding is None:
                        break
                    yield finding
                    since = time.monotonic()
                elif time.monotonic() - since < check.limit_s:
                    on_wait(check, time.monotonic() - since)
            process.join(_END_S)
            if process.exitcode not in (0, None):
                yield fail(check.subject, _describe_end(process.exitcode, printed), check.remedy)
        finally:
            process.kill()
            process.join()


def _received(receiver: Connection) -> Finding | None:
    try:
        return receiver.recv()
    except EOFError:
        return None


def _report_to(sender: Connection, check: Check, printed: str) -> None:
    """Is the process: what it prints goes to a file, and what it finds to the other end of the pipe."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    for finding in attempt(check.subject, lambda: resolve_name(check.run)(*check.arguments), check.remedy):
        sender.send(finding)


def _describe_end(exit_code: int, printed: Path) -> str:
    try:
        how = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
    except ValueError:
        how = f"signal {-exit_code}"
    lines = printed.read_text(errors="replace").split("\n") if printed.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"its process ended by {how}" + (f"; it had printed: {last[:300]}" if last else "")
