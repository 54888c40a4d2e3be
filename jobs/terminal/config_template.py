"""Writes a `--config` file to fill in: every option with its docstring and its default."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from jobs.terminal.command_line import list_facts
from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.options import Config, Option, list_options

_WIDTH = 100
_INDENT = "  "


def render_template(command: str, kind: type[Config]) -> str:
    """Returns the file for a job, whose config is of a class, as YAML with comments."""
    return "\n".join(_lines(command, kind)) + "\n"


def write_template(uri: str, text: str) -> None:
    """Writes the file.

    Raises:
        ConfigError: There is a file already.
        StorageError: It cannot be written.
    """
    if storage.exists(uri):
        raise ConfigError(
            "There is a file already, and nothing was written.", where=uri, remedy="Give another --out, or remove it."
        )
    storage.write_bytes(uri, text.encode())


def _lines(command: str, kind: type[Config]) -> Iterator[str]:
    introduction = (
        f"Options of `smallcap {command} --config FILE`, with their defaults. What is required has no value yet. Flags "
        "win over this file."
    )
    yield from _comment(introduction, "")
    group: list[str] = []
    for option in list_options(kind):
        *groups, name = option.key.split(".")
        for depth, inner in enumerate(groups):
            if group[: depth + 1] != groups[: depth + 1]:
                is_last = depth == len(groups) - 1
                yield from ("", *(_comment(option.group.__doc__ or "", _INDENT * depth) if is_last else ()))
                yield f"{_INDENT * depth}{inner}:"
        group = groups
        indent = _INDENT * len(groups)
        facts = "; ".join(filter(None, ["a list: [a, b]" if option.is_list else "", *_facts(option)]))
        yield from ("", *_comment(f"{option.summary} [{facts}]" if facts else option.summary, indent))
        yield f"{indent}{name}:{_value(option)}"


def _facts(option: Option) -> list[str]:
    """Returns the facts that the file does not show: not the default, which stands there as the value."""
    return [fact for fact in list_facts(option) if fact != "repeatable" and "default" not in fact.partition(":")[0]]


def _comment(text: str, indent: str) -> list[str]:
    begin = f"{indent}# "
    words = " ".join(text.split())
    return textwrap.wrap(words, _WIDTH, initial_indent=begin, subsequent_indent=begin, break_on_hyphens=False)


def _value(option: Option) -> str:
    if option.is_required:
        return ""
    value: Any = option.default_value
    plain = list(value) if isinstance(value, tuple) else value
    in_list: str = yaml.safe_dump([plain], default_flow_style=True, width=10_000)
    return f" {in_list.strip()[1:-1]}"
