"""smallcap's command lines as its own parser reads them, for commands that stand in files and documents."""

import shlex
from dataclasses import replace
from functools import wraps
from typing import Any

import typer

from jobs.cli import COMMANDS
from smallcap.options import Config


def parse_command(line: str) -> tuple[str, tuple[Config, ...]]:
    """Parses a command as `smallcap` does, and runs nothing.

    Returns:
        The command's name, and its configs: a job's and that of the call, or that of a look-up.
    """
    program, *words = shlex.split(line)
    assert program == "smallcap", line
    command = max(
        (command for command in COMMANDS if words[: len(command.name.split())] == command.name.split()),
        key=lambda command: len(command.name),
    )
    parsed: list[Config] = []

    @wraps(command.run)  # its annotations are the classes of the options
    def take(*configs: Any) -> None:
        parsed.extend(configs)

    app = typer.Typer(add_completion=False)
    replace(command, run=take).add_to(app)
    app(words[len(command.name.split()) :], standalone_mode=False)
    assert parsed, line
    return command.name, tuple(parsed)
