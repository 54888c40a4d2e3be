"""Shows people how far training is, from the log that a worker writes: a line when there is news."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.captioning.progress import run_in_thread
from jobs.training.log import FLUSH_S, read_log_lines
from smallcap.errors import StorageError


@contextmanager
def show_training(out: str, steps: int) -> Iterator[None]:
    """Prints the newest step and its loss to the terminal while training goes on.

    Args:
        out: The run's folder.
        steps: The number of steps of the whole run.
    """
    with run_in_thread(_watch, out, steps):
        yield


def _watch(out: str, steps: int, ended: threading.Event) -> None:
    shown = ""
    while not ended.wait(FLUSH_S):
        try:
            line = (read_log_lines(out) or [""])[-1]
        except StorageError:  # the worker will say so, if it matters
            continue
        if line and line != shown:
            print(progress_line(line, steps), file=sys.stderr, flush=True)
            shown = line


def progress_line(line: str, steps: int) -> str:
    """Returns a line of the log, in words."""
    values = json.loads(line)
    return f"step {values['step']:,} of {steps:,}, epoch {values['epoch']}: loss {values['loss']:.4f}"
