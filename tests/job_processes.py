"""Jobs as processes with a Ray of their own, which tests kill. They are found by a mark in their environment."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

MARK = "SMALLCAP_TEST_RUN"


class JobProcess:
    """A command as a process group, and all that it has started; start it by the fixture `start_job`, which ends it.

    Args:
        command: Runs in the folder of `log`.
        log: What it prints.
        environment: Beside this process's.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, environment: dict[str, str]) -> None:
        self.log, self._mark = log, uuid.uuid4().hex
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                env=inherited | environment | {MARK: self._mark},
                start_new_session=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
            )

    def processes(self, titles: Sequence[str] = ("",)) -> list[int]:
        """Returns the ids of this job's processes whose title begins with one of these."""
        found, beginnings = [], tuple(title.encode() for title in titles)
        for folder in Path("/proc").iterdir():
            try:
                ours = folder.name.isdigit() and f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes()
                if ours and (folder / "cmdline").read_bytes().startswith(beginnings):
                    found.append(int(folder.name))
            except OSError:  # it has just ended, or belongs to someone else
                continue
        return found

    def kill_one(self, titles: Sequence[str]) -> bool:
        """Kills one process with such a title; returns whether there was one: they come and go."""
        for process in self.processes(titles):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                return True
        return False

    def kill_all(self) -> None:
        """Kills the driver and its Ray, as a machine that goes down does; returns when none is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 30
        while left := self.processes():
            assert time.monotonic() < deadline, f"these processes do not end: {left}"
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Waits while the job runs; fails when it ends first, or when the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the job ended too early:\n{self.printed()}"
            assert time.monotonic() < deadline, f"nothing happened in time:\n{self.printed()}"
            time.sleep(0.02)

    def wait(self, seconds: float = 200, status: int = 0) -> None:
        """Waits for the end of the job; fails when its exit status is another."""
        assert self.process.wait(timeout=seconds) == status, self.printed()

    def printed(self) -> str:
        """Returns the end of what the job has printed."""
        return self.log.read_text()[-3000:]


StartJob = Callable[..., JobProcess]
"""Called with a command, a log, and variables of its environment."""
