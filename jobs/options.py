"""Writes docs/options.md from the commands: `python -m jobs.options > docs/options.md` (`make docs`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from jobs.cli import COMMANDS
from jobs.screen import say
from jobs.terminal.command_line import Command, list_facts, show_usage
from smallcap.options import Option

_INTRODUCTION = """# Options

All commands with all their options. `make docs` generates this page from the declarations of the options
(`smallcap/config.py`, `smallcap/training/config.py`, `jobs/terminal/call_options.py`); a test compares it with them.

A *key* is an option's name in a `--config` file and for `--set`. A config file wins over the defaults, flags win over
both, and `--set` wins over all. N is a whole number, X any number. `--no-add` turns off the switch `--add`.
`python -m smallcap` is the same as `smallcap`; `python -m jobs.build_index`, `jobs.caption`, `jobs.train` and
`jobs.evaluate` take the same options as the commands.
`-h` and `--help` explain a command. `smallcap config init caption` writes a config file with every option of `caption`,
what it means, and its default. `smallcap --install-completion` lets the shell (bash, zsh, fish or PowerShell) complete
commands, options and their values.

Results go to stdout; errors, warnings and news of what goes on go to stderr. `-q` leaves out the news, `-v` adds
details, and `--log-file` keeps all of it. `--json` is for programs:
[Formats](formats.md#what-commands-tell-programs) has its keys.

A config file is YAML without aliases. Numbers are finite and at most 2^53 in size. Texts are UTF-8 and not empty, with
control codes only in names of input files, in tokens, and in the text of a search. Whatever else is given is a usage
error, which names the option before anything is read, started or written.

## Exit codes

| exit code | meaning |
|---|---|
| 0 | Done, or there was nothing to do. |
| 1 | The run failed: storage, an index, a model, a file or the cluster cannot be used. For `doctor`: a check failed. |
| 2 | Usage error: an option, a config file or what it names is wrong, missing, or contradicts the run in the folder. |
| 3 | `caption` is done, and more of the run's rows are errors than `--max-error-rate` allows; a line says how many. |
| 130, 143 | Ctrl-C or SIGTERM stopped the command; what was done is kept, and the same command goes on. |
| 141 | Whoever read the output left before its end, as `head` does. |
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
    say(render_page().removesuffix("\n"))
