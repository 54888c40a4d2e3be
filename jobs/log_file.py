"""The file of `--log-file`: each line that is printed, with the time, and what libraries log.

It knows nothing of what is printed where; `jobs.screen` gives it everything.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.phrasing import visible


class _LogFile(logging.Handler):
    """The open file; also the handler of what libraries log."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self._descriptor: int | None = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        """Writes what a library has logged."""
        self.write(self.format(record))

    def write(self, text: str) -> None:
        """Appends lines at once, so that those of other threads and processes come before or after."""
        if self._descriptor is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = "".join(f"{now} {line}\n" for line in visible(text).rstrip("\n").split("\n"))
        try:
            os.write(self._descriptor, lines.encode(errors="backslashreplace"))
        except OSError as error:  # the job matters more than its log
            self.close()
            os.write(2, f"The log file cannot be written any more: {error.strerror}.\n".encode())

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()


_open: list[_LogFile] = []  # at most one


def open_log(path: str) -> None:
    """Opens the log file; what it holds already stays.

    Raises:
        ConfigError: It is not on this machine, or cannot be written.
    """
    close_log()
    where, expected = f"--log-file {path}", "a file on this machine, in a folder that exists"
    if not storage.is_local(path):
        raise ConfigError("A log file is appended to, which this store cannot do.", where=where, expected=expected)
    try:
        descriptor = os.open(Path(storage.absolute(path)), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            "The log file cannot be written.", where=where, expected=expected, found=str(error)
        ) from error
    log_file = _LogFile(descriptor)
    root = logging.getLogger()
    if not root.handlers and logging.lastResort is not None:
        root.addHandler(logging.lastResort)  # which prints where there is no other
    root.addHandler(log_file)
    logging.captureWarnings(True)
    _open.append(log_file)


def close_log() -> None:
    """Closes the log file, if one is open."""
    while _open:
        log_file = _open.pop()
        root = logging.getLogger()
        root.removeHandler(log_file)
        if logging.lastResort is not None:
            root.removeHandler(logging.lastResort)
        logging.captureWarnings(False)
        log_file.close()


def is_logging() -> bool:
    """Says whether a log file is open."""
    return bool(_open)


def log(text: str) -> None:
    """Writes text to the log file, if one is open."""
    for log_file in _open:
        log_file.write(text)
