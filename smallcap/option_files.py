"""Reads options as YAML: a `--config` file, or the value of a `--set`.

It reads what a person writes, and refuses what only a mistake or an attack holds: a key that is given twice, aliases,
whose expansion may have no end, and files that are far too large.
"""

from __future__ import annotations

from typing import Any

import yaml

from smallcap import storage
from smallcap.errors import ConfigError, StorageError

_MOST_BYTES = 1 << 20
# PyYAML's own errors, and what its constructors raise: for 0b_, for the day 2020-13-45, for a sign or a tag without a
# value, for brackets that are nested too deep.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Plain YAML, without aliases and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias (*name); write its value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def parse_value(text: str | bytes, where: str) -> Any:
    """Parses YAML.

    Args:
        text: The YAML.
        where: Where it is from, for errors.

    Raises:
        ConfigError: It is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except _YAML_ERRORS as error:
        raise ConfigError(
            "This is not YAML as options are written.",
            where=where,
            expected="a number, true, false, null, text, or [a, list]; text with special characters in quotes",
            found=_problem_of(error),
        ) from error


def _problem_of(error: Exception) -> str:
    """Returns what is wrong with YAML, and where, in a line."""
    if isinstance(error, RecursionError):
        return "brackets nested too deep"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split()) or type(error).__name__


def read_option_file(uri: str) -> dict[str, Any]:
    """Reads a `--config` file.

    Args:
        uri: The file.

    Returns:
        Its options and groups of options; none where it is empty.

    Raises:
        ConfigError: It does not exist, cannot be read here, or is not a YAML mapping.
        StorageError: The service that has it fails.
    """
    try:
        with storage.open_ranged(uri) as file:
            data = file.read(_MOST_BYTES + 1)
    except (StorageError, OSError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        if not storage.is_local(uri) and not isinstance(cause, FileNotFoundError | ValueError | ImportError):
            raise
        found = getattr(error, "found", "") or str(cause)
        raise ConfigError("The config file cannot be read.", where=f"--config {uri}", found=found) from error
    if len(data) > _MOST_BYTES:
        most = f"{_MOST_BYTES:,} bytes at most"
        raise ConfigError("The config file is too large to be one.", where=f"--config {uri}", expected=most)
    values = parse_value(data, uri)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            "The config file must hold a mapping.",
            where=uri,
            expected="name: value lines",
            found=type(values).__name__,
        )
    return values
