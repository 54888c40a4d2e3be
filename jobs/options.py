"""Writes docs/options.md from the commands: `python -m jobs.options > docs/options.md` (`make docs`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from jobs.cli import COMMANDS
from jobs.terminal.command_line import Command, list_facts, show_usage
from smallcap.options import Option

_INTRODUCTION = """# Options

All commands with all their options. `make docs` generates this page from the declarations of the options
(`smallcap/config.py`, `smallcap/training/config.py`, `jobs/terminal/call_options.py`); a test compares it with them.

A *key* is an option's name in a `--config` file and for `--set`. A config file wins over the defaults, flags win over
both, and `--set` wins over all. N is a whole number, X any number. `--no-add` turns off the switch `--add`.
`python -m jobs.build_index`, `jobs.caption`, `jobs.train` and `jobs.evaluate` take the same options as the commands.
"""


def render_page() -> str:
    """Returns the page as Markdown."""
    return "\n".join([_INTRODUCTION, *(line for command in COMMANDS for line in _render_command(command))])


def _render_command(command: Command) -> Iterator[str]:
    yield from (f"## smallcap {command.name}", "", command.summary, "", f"    {command.example}", "")
    for title, options in groupby(command.options(), command.section):
        yield from (f"**{title}**", "", "| option | key | values | what |", "|---|---|---|---|")
        yield from map(_render_row, options)
        yield ""


def _render_row(option: Option) -> str:
    cells = (f"`{show_usage(option)}`", f"`{option.key}`", "; ".join(list_facts(option)), option.summary)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(render_page(), end="")
