"""The doorway to the terminal: everything that is printed goes through here.

What a caption, a file's name or a service's answer holds cannot steer a terminal, a terminal that lacks a character
shows it escaped, and an output that nobody reads any more ends the process quietly. A test finds other prints.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, NoReturn, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from smallcap.errors import RunError
from smallcap.phrasing import visible

EXIT_BROKEN_PIPE = 128 + 13  # as a shell reports a command that SIGPIPE has ended


def prepare() -> None:
    """Makes this process's output and log safe, whatever is written and whoever reads it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before this process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - it stays open
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_VisibleRecord)


class _VisibleRecord(logging.LogRecord):
    """A line of a log, of whatever library."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return visible(super().getMessage())


def say(text: str = "", stream: TextIO | None = None) -> None:
    """Prints text for people.

    Args:
        text: One or more lines; what they hold of elsewhere need not be escaped.
        stream: Where it is printed; by default stdout.
    """
    stream = stream or sys.stdout
    with _writing(stream):
        print(visible(text), file=stream, flush=True)


def say_lines(lines: Iterable[str]) -> None:
    """Prints lines for people, each of which stays one whatever it holds."""
    say("\n".join(visible(line, kept="") for line in lines))


def tell(text: str) -> None:
    """Prints text for people to stderr: news of what goes on, or an error."""
    say(text, sys.stderr)


def say_json(value: Any) -> None:
    """Prints a value for programs, as one line of JSON in ASCII."""
    say(json.dumps(value))


class VisibleConsole(Console):
    """A console for tables and styled text that escapes what it is given before it breaks lines; markup is text.

    Args:
        stream: Where it prints; by default to what stdout is at that time.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(file=stream, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Returns what is written of something, in pieces."""
        if isinstance(renderable, str):
            renderable = visible(renderable)
        elif isinstance(renderable, Text):
            shown = visible(renderable.plain)
            renderable = renderable if shown == renderable.plain else renderable.blank_copy(shown)
        yield from super().render(renderable, options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints tables, texts and styled texts."""
        with _writing(self.file):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> NoReturn:
        """Ends the process quietly."""
        _give_up(self.file)


def finish() -> None:
    """Writes what is still held back, so that a failure of that is told as well."""
    with _writing(sys.stdout):
        sys.stdout.flush()


@contextmanager
def _writing(stream: Any) -> Iterator[None]:
    """Ends the process quietly where nobody reads any more, and with one message where there is no room.

    Raises:
        RunError: The output cannot be written.
        SystemExit: It was a pipe, and its reader has ended.
    """
    try:
        yield
    except BrokenPipeError:
        _give_up(stream)
    except OSError as error:
        _silence(stream)
        raise RunError(
            "The output cannot be written.",
            where="stderr" if stream is sys.stderr else "stdout",
            found=error.strerror or str(error),
            remedy="Make room there, or print elsewhere.",
        ) from error


def _give_up(stream: Any) -> NoReturn:
    _silence(stream)
    raise SystemExit(EXIT_BROKEN_PIPE)


def _silence(stream: Any) -> None:
    """Lets what a stream holds back go nowhere: Python would fail again when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
