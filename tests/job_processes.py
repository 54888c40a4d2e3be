"""Jobs as processes with a Ray of their own, which tests kill. They are found by a mark in their environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

MARK = "SMALLCAP_TEST_RUN"
SITE = """
import asyncio, os, pathlib, time

def hold():
    held = pathlib.Path(os.environ["HELD"])
    held.with_name(f".{os.getpid()}").write_text(str(os.getpid()))
    held.with_name(f".{os.getpid()}").replace(held)

if os.environ.get("HELD"):
    replace = pathlib.Path.replace

    def slow_replace(self, target):
        if "/part-" in str(target):
            hold()
            time.sleep(1)
        return replace(self, target)

    pathlib.Path.replace = slow_replace
    if os.environ.get("HELD_ON_S3"):
        import s3fs

        pipe = s3fs.S3FileSystem._pipe_file

        async def slow_pipe(self, path, data, **options):
            if "/part-" in path:
                hold()
                await asyncio.sleep(1)
            return await pipe(self, path, data, **options)

        s3fs.S3FileSystem._pipe_file = slow_pipe

if os.environ.get("OPENING_TAKES"):
    import PIL.Image

    open_image = PIL.Image.open

    def slow_open(*arguments, **options):
        image = open_image(*arguments, **options)
        time.sleep(float(os.environ["OPENING_TAKES"]))
        if str(image.size) == os.environ.get("DEADLY_SIZE"):
            os.kill(os.getpid(), 11)
        return image

    PIL.Image.open = slow_open
"""


def free_port() -> int:
    """Returns a port on which nothing listens, outside the range of Ray's workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port >= 20000:
            return port


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

    def until(self, condition: Callable[[], object], seconds: float = 240) -> None:
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


def held_parts(held: Path, out: str) -> dict[str, str]:
    """Returns the environment in which parts are held back."""
    return {"HELD": str(held)} | ({"HELD_ON_S3": "1"} if out.startswith("s3") else {})


def site_in(folder: Path, paths: str) -> dict[str, str]:
    """Returns the environment in which every Python process runs the test's `sitecustomize`."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "site"), paths]))}
