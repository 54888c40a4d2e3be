"""A run's loss curve, `train_log.jsonl`: one line for each step, without gaps and doubles whatever was interrupted.

Object stores have no appending, so that the file is written whole: with each checkpoint, and some seconds apart.
"""

from __future__ import annotations

import json
import time
from typing import Any

from smallcap import storage

LOG_FILE = "train_log.jsonl"
FLUSH_S = 30.0  # between two writes, where no checkpoint comes before


class TrainLog:
    """The lines of a run, held by the one worker that writes them.

    Args:
        out: The run's folder.
        steps: That the checkpoint has which the run goes on from; later lines are done again.
    """

    def __init__(self, out: str, steps: int) -> None:
        self._uri = storage.join(out, LOG_FILE)
        self._lines = read_log_lines(out)[:steps]
        self._written_at = time.monotonic()

    def add(self, **values: Any) -> None:
        """Adds a step's line."""
        self._lines.append(json.dumps(values))
        if time.monotonic() - self._written_at > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes all lines."""
        storage.write_bytes(self._uri, "".join(f"{line}\n" for line in self._lines).encode())
        self._written_at = time.monotonic()


def read_log_lines(out: str) -> list[str]:
    """Returns the lines of a run's log, oldest first; none where there is no log."""
    uri = storage.join(out, LOG_FILE)
    return storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
