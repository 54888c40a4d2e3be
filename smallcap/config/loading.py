"""Configs read from a YAML file, flags and `--set a.b=c`, and what is said when they are wrong.

Later sources win: defaults, then `--config FILE`, then flags, then `--set`.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from smallcap import storage
from smallcap.config.options import Config, Option, list_options
from smallcap.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(
    kind: type[ConfigT],
    file: str | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Builds a config from a YAML file, flags and `a.b=c` settings; later ones win.

    Args:
        kind: The config class.
        file: URI of a YAML mapping.
        flags: Dotted keys to values, which may be text; `None` means that the flag was not given.
        sets: `a.b=c` strings; the value is read as YAML, so that `3`, `true` and `[a, b]` have their types.
        base: A dumped config that all these change, in the place of the defaults.

    Raises:
        ConfigError: An option is unknown, missing or wrong, or the file is not a YAML mapping.
    """
    values: dict[str, Any] = copy.deepcopy(dict(base)) if base else {}
    values |= _read_yaml(file) if file else {}
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    for key, value in given.items():
        _assign(values, key, value)
    for setting in sets:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError("A --set needs a name and a value.", where=setting, expected="--set group.name=value")
        _assign(values, key.strip(), _parse_yaml(text, f"--set {setting}"))
        given.pop(key.strip(), None)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _as_config_error(kind, error, given, file) from error


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Lists what differs between two dumped configs, as `key: old → new` lines.

    Args:
        old: The one config.
        new: The other.
        free: Dotted keys of options, or of groups of them, that may differ.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{key}: {json.dumps(before.get(key))} → {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(f"{key}.".startswith(f"{group}.") for group in free)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("This is not YAML.", where=where, found=str(error)) from error


def _read_yaml(file: str) -> dict[str, Any]:
    values = _parse_yaml(storage.read_bytes(file), file)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            "The config file must hold a mapping.",
            where=file,
            expected="name: value lines",
            found=type(values).__name__,
        )
    return values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ConfigError("A setting names an option inside one that is not a group.", where=key)
        values = inner
    values[name] = value


def _as_config_error(
    kind: type[Config], error: ValidationError, flags: Collection[str], file: str | None
) -> ConfigError:
    """Says in our own words what is wrong: an unknown key, or all missing options, or a wrong value.

    Args:
        kind: The config class.
        error: pydantic's report.
        flags: Keys of the options that came as flags, which are named as such.
        file: The config file.
    """
    options = {option.key: option for option in list_options(kind)}
    problems = [(problem["type"], [str(part) for part in problem["loc"]], problem) for problem in error.errors()]
    for _, parts, _ in (problem for problem in problems if problem[0] == "extra_forbidden"):
        return _unknown_key(".".join(parts), options)
    if missing := [options[".".join(parts)].names[-1] for fault, parts, _ in problems if fault == "missing"]:
        *first, last = missing
        what = "Options are missing." if first else "An option is missing."
        return ConfigError(what, where=file or "", remedy=f"Give {', '.join(first)}{' and ' if first else ''}{last}.")
    fault, parts, problem = problems[0]
    reason = problem["msg"].removeprefix("Value error, ")
    keys = (".".join(parts[:end]) for end in range(len(parts), 0, -1))  # after a key may stand a list's place, a type
    option = next((options[key] for key in keys if key in options), None)
    if option is None:
        where = ".".join(parts) or file or ""
        return ConfigError("The options do not fit together.", where=where, expected=reason)
    return ConfigError(
        "An option's value is wrong.",
        where=option.names[-1] if option.key in flags else option.key,
        expected=reason if fault == "value_error" else option.values or reason,
        found=repr(problem["input"]),
    )


def _unknown_key(key: str, options: Mapping[str, Option]) -> ConfigError:
    """Names the valid keys of the same group, and the nearest one, if need be in another group."""
    group, _, name = key.rpartition(".")
    prefix = f"{group}." if group else ""
    siblings = sorted({valid.removeprefix(prefix).partition(".")[0] for valid in options if valid.startswith(prefix)})
    others = {valid.rpartition(".")[2]: valid for valid in options}
    nearest = [prefix + close for close in difflib.get_close_matches(name, siblings, n=1)]
    nearest += [others[close] for close in difflib.get_close_matches(name, others, n=1)]
    return ConfigError(
        "There is no such option.",
        where=key,
        expected=", ".join(siblings),
        remedy=f"Did you mean {nearest[0]}?" if nearest else "",
    )
