"""How options are declared, described and read.

A field of a config class, with its docstring, is an option's only declaration. Its key in `--config` files and for
`--set`, its flag, its line in `--help` and its row in docs/options.md follow from it. Later sources win: defaults, then
`--config FILE`, then flags, then `--set a.b=c`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from smallcap import storage
from smallcap.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of all option groups: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Flag:
    """How the command line names a field, if not simply `--its-name`; an entry of the field's `Annotated`."""

    names: tuple[str, ...] = ()  # such as -k and --k; empty for the field's own name
    has_commas: bool = False  # one flag may name several values: a,b,c
    is_positional: bool = False


POSITIONAL = Flag(is_positional=True)


@dataclass(frozen=True)
class Option:
    """One option of a job or of a look-up."""

    key: str  # dotted, as in config files and for --set
    group: type[Config]  # the class that declares it
    names: tuple[str, ...]  # its flags; for a positional argument its placeholder, such as IMAGES
    summary: str  # its docstring, as one line
    values: str  # allowed values in words; empty for free text and for switches
    default: str  # as a user types it; empty for `None`, an empty list and a switch that is off
    is_required: bool
    is_positional: bool
    is_switch: bool  # its flag takes no value
    is_list: bool  # its flag may be repeated
    has_commas: bool  # its flag may name several values: a,b,c


def list_options(kind: type[Config], prefix: str = "") -> Iterator[Option]:
    """Yields all options of a config class, those of its groups last.

    Args:
        kind: The class.
        prefix: Dotted names of the groups that hold it, with a dot at the end.
    """
    groups = {}
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Config):
            groups[f"{prefix}{name}."] = annotation
        else:
            yield _describe_field(f"{prefix}{name}", kind, field)
    for inner, group in groups.items():
        yield from list_options(group, inner)


def _describe_field(key: str, group: type[Config], field: FieldInfo) -> Option:
    flag = next((entry for entry in field.metadata if isinstance(entry, Flag)), Flag())
    name = key.rpartition(".")[2].replace("_", "-")
    values = _describe_type(field.annotation, field.metadata)
    is_list = get_origin(field.annotation) is tuple
    default = "" if field.is_required() or field.default is None or field.default is False else field.default
    return Option(
        key=key,
        group=group,
        names=(name.upper(),) if flag.is_positional else flag.names or (f"--{name}",),
        summary=" ".join((field.description or "").split()),
        values=values,
        default=",".join(default) if isinstance(default, tuple) else str(default),
        is_required=field.is_required(),
        is_positional=flag.is_positional,
        is_switch=field.annotation is bool,
        is_list=is_list,
        has_commas=flag.has_commas or (is_list and values.startswith("one of")),
    )


def _describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe_type(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        return " or ".join(_describe_type(kind, metadata) for kind in arguments if kind is not type(None))
    if origin is Literal:
        return str(arguments[0]) if len(arguments) == 1 else f"one of {', '.join(arguments)}"
    if origin is tuple:
        return _describe_type(arguments[0])
    noun = {int: "a whole number", float: "a number"}.get(annotation, "")
    return noun + _describe_bounds(metadata) if noun else ""


def _describe_bounds(metadata: Sequence[Any]) -> str:
    entries = [inner for entry in metadata for inner in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = {name: getattr(entry, name) for entry in entries for name in words if hasattr(entry, name)}
    if bounds.keys() == {"ge", "le"}:
        return f" from {bounds['ge']} to {bounds['le']}"
    return ",".join(f" {words[name]} {bound}" for name, bound in bounds.items())


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
        base: A dumped config that replaces the defaults.

    Raises:
        ConfigError: An option is unknown, missing or wrong, or the file is not a YAML mapping.
    """
    values: dict[str, Any] = copy.deepcopy(dict(base)) if base else {}
    values |= _read_yaml(file) if file else {}
    flag_values = {key: value for key, value in (flags or {}).items() if value is not None}
    for key, value in flag_values.items():
        _assign(values, key, value)
    for setting in sets:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError("--set needs a name and a value.", where=setting, expected="--set a.b=c")
        _assign(values, key.strip(), _parse_yaml(text, f"--set {setting}"))
        flag_values.pop(key.strip(), None)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _as_config_error(kind, error, flag_values, file) from error


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Lists what differs between two dumped configs, as `key: old → new` lines.

    Args:
        old: The earlier config.
        new: The later config.
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
            raise ConfigError("A setting names an option inside another that is not a group.", where=key)
        values = inner
    values[name] = value


def _as_config_error(
    kind: type[Config], error: ValidationError, flags: Collection[str], file: str | None
) -> ConfigError:
    """Says in plain words what is wrong: an unknown key, all missing options, or a wrong value.

    Args:
        kind: The config class.
        error: pydantic's report.
        flags: Keys of the options that were given as flags; the error names the flag.
        file: The config file.
    """
    options = {option.key: option for option in list_options(kind)}
    problems = [(problem["type"], [str(step) for step in problem["loc"]], problem) for problem in error.errors()]
    if unknown := next((path for fault, path, _ in problems if fault == "extra_forbidden"), None):
        return _unknown_key(".".join(unknown), options)
    if missing := [options[".".join(path)].names[-1] for fault, path, _ in problems if fault == "missing"]:
        *first, last = missing
        what = "Options are missing." if first else "An option is missing."
        return ConfigError(what, where=file or "", remedy=f"Give {', '.join(first)}{' and ' if first else ''}{last}.")
    fault, path, problem = problems[0]
    reason = problem["msg"].removeprefix("Value error, ")
    keys = (".".join(path[:end]) for end in range(len(path), 0, -1))  # a list position or a type may follow a key
    option = next((options[key] for key in keys if key in options), None)
    if option is None:
        where = ".".join(path) or file or ""
        return ConfigError("The options do not fit together.", where=where, expected=reason)
    return ConfigError(
        "An option's value is wrong.",
        where=option.names[-1] if option.key in flags else option.key,
        expected=reason if fault == "value_error" else option.values or reason,
        found=repr(problem["input"]),
    )


def _unknown_key(key: str, options: Mapping[str, Option]) -> ConfigError:
    """Lists the valid keys of the same group, and names the nearest one, in another group if need be."""
    group, _, name = key.rpartition(".")
    prefix = f"{group}." if group else ""
    siblings = sorted({valid.removeprefix(prefix).partition(".")[0] for valid in options if valid.startswith(prefix)})
    others = {valid.rpartition(".")[2]: valid for valid in options}
    nearest = [prefix + close for close in get_close_matches(name, siblings, n=1)]
    nearest += [others[close] for close in get_close_matches(name, others, n=1)]
    return ConfigError(
        "There is no such option.",
        where=key,
        expected=", ".join(siblings),
        remedy=f"Did you mean {nearest[0]}?" if nearest else "",
    )
