"""A run's loss curve, `train_log.jsonl`: one line for each step, without gaps or repeats after interruptions.

Object stores cannot append, so the whole file is written: with each checkpoint, and every half minute.
"""

from __future__ import annotations

import json
import time
from typing import Any

from smallcap import storage

LOG_FILE = "train_log.jsonl"
_FLUSH_S = 30.0  # between two writes, where no checkpoint comes earlier


class TrainLog:
    """The lines of a run, held by the worker that writes them.

    Args:
        out: The run's folder.
        steps: The steps of the checkpoint from which the run resumes; later lines are dropped.
    """

    def __init__(self, out: str, steps: int) -> None:
        self._uri = storage.join(out, LOG_FILE)
        self._lines = read_log_lines(out)[:steps]
        self._written_at = time.monotonic()

    def add(self, **values: Any) -> None:
        """Adds the line of a step."""
        self._lines.append(json.dumps(values))
        if time.monotonic() - self._written_at > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes all lines."""
        storage.write_bytes(self._uri, "".join(f"{line}\n" for line in self._lines).encode())
        self._written_at = time.monotonic()


def read_log_lines(out: str) -> list[str]:
    """Returns the lines of a run's log, oldest first; an empty list where there is no log."""
    uri = storage.join(out, LOG_FILE)
    return storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
