"""The doorway to the terminal: everything that is printed goes through here, and into the log file if there is one.

What a caption, a file's name or a service's answer holds cannot steer a terminal, a terminal that lacks a character
shows it escaped, and an output that nobody reads any more ends the process quietly. A test finds other prints.

Results go to stdout; errors, warnings, news of what goes on and details go to stderr. `-q` leaves out news, `-v` adds
details, and with `--json` stdout has nothing but the JSON.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from typing import IO, Any, NoReturn, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from jobs.log_file import is_logging, log
from smallcap.errors import RunError, SmallCapError
from smallcap.phrasing import visible

_SIGNALLED = 128  # of a command that a signal has ended; the signal's number is added
EXIT_BROKEN_PIPE = _SIGNALLED + 13  # as a shell reports a command that SIGPIPE has ended


@dataclass
class _Printing:
    """What is printed in this process, and where."""

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False
    command: str | None = None  # for the JSON of an error


_printing = _Printing()


def prepare() -> None:
    """Makes this process's output and log safe, whatever is written and whoever reads it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before this process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - it stays open
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_VisibleRecord)


def choose_printing(
    *, quiet: bool = False, verbose: bool = False, as_json: bool = False, command: str | None = None
) -> None:
    """Sets what this process prints from now on.

    Args:
        quiet: Whether news is left out.
        verbose: Whether details are printed.
        as_json: Whether stdout is for one value of JSON, so that people read stderr.
        command: The words after `smallcap`.
    """
    _printing.quiet, _printing.verbose = quiet, verbose
    _printing.as_json, _printing.command = as_json, command


def is_quiet() -> bool:
    """Says whether news is left out on the screen."""
    return _printing.quiet


def is_verbose() -> bool:
    """Says whether details are printed."""
    return _printing.verbose


class _VisibleRecord(logging.LogRecord):
    """A line of a log, of whatever library."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return visible(super().getMessage())


def say(text: str = "") -> None:
    """Prints a result for people, of one or more lines; what they hold of elsewhere need not be escaped."""
    _print(text, sys.stderr if _printing.as_json else sys.stdout)


def say_lines(lines: Iterable[str]) -> None:
    """Prints lines of a result, each of which stays one whatever it holds."""
    say("\n".join(visible(line, kept="") for line in lines))


def say_report(text: str, result: slice) -> None:
    """Prints what a job has done; with `-q` only the lines that are its result."""
    stream = sys.stderr if _printing.as_json else sys.stdout
    if not _printing.quiet:
        _print(text, stream)
        return
    log(text)
    if lines := text.split("\n")[result]:
        _print("\n".join(lines), stream, is_logged=False)


def tell(text: str) -> None:
    """Prints an error or a warning to stderr."""
    _print(text, sys.stderr)


def note(text: str) -> None:
    """Prints news of what goes on to stderr, unless the command is quiet."""
    if _printing.quiet:
        log(text)
    else:
        tell(text)


def detail(text: str) -> None:
    """Prints to stderr what only a verbose command tells."""
    if _printing.verbose:
        tell(text)


def write_at(descriptor: int, text: str, is_news: bool = False) -> None:
    """Prints text at once to a descriptor: from a signal's handler, or while stderr is elsewhere."""
    log(text.strip())
    if not (is_news and _printing.quiet):
        os.write(descriptor, f"{text}\n".encode())


def say_json(value: Any) -> None:
    """Prints a value for programs, as one line of JSON in ASCII."""
    stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # past a live display
    _print(json.dumps(value), stream)


def say_result(values: Mapping[str, Any], status: str = "done", exit_code: int = 0) -> None:
    """Prints the JSON of a job that has ended; docs/formats.md describes it."""
    say_json({"command": _printing.command, "status": status, "exit_code": exit_code, **values})


def say_failure(error: BaseException, exit_code: int) -> None:
    """Prints the JSON of a command that has failed or was stopped, if it was asked for JSON."""
    if not _printing.as_json:
        return
    told = error if isinstance(error, SmallCapError) else SmallCapError(str(error))
    values = {"kind": type(error).__name__, "error": told.what}
    values |= {name: getattr(told, name) for name in ("where", "expected", "found", "remedy")}
    say_result(values, "stopped" if exit_code > _SIGNALLED else "failed", exit_code)


def _print(text: str, stream: TextIO, is_logged: bool = True) -> None:
    shown = visible(text)
    if is_logged:
        log(shown)
    with _writing(stream):
        print(shown, file=stream, flush=True)


class VisibleConsole(Console):
    """A console for tables and styled text that escapes what it is given before it breaks lines; markup is text.

    Args:
        stream: Where it prints; by default to where results for people go at that time.
        is_news: Whether a quiet command leaves out what is printed.
        options: Those of rich's consoles.
    """

    def __init__(self, stream: IO[str] | None = None, is_news: bool = False, **options: Any) -> None:
        super().__init__(file=stream, highlight=False, markup=False, emoji=False, **options)
        self._is_news = is_news

    @property
    def file(self) -> IO[str]:
        """Where it prints."""
        self.stderr = _printing.as_json  # which counts where no stream was given
        return super().file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

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
        if is_logging():
            plain = VisibleConsole(io.StringIO(), width=self.width, color_system=None, force_terminal=False)
            Console.print(plain, *objects, **options)
            log(plain.file.getvalue())  # type: ignore[attr-defined]
        if self._is_news and _printing.quiet:
            return
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
