"""How options are declared, described and read.

A field of a config class, with its docstring, is an option's only declaration. Its key in `--config` files and for
`--set`, its flag, its line in `--help` and its row in docs/options.md follow from it. Later sources win: defaults, then
`--config FILE`, then flags, then `--set a.b=c`.
"""

from __future__ import annotations

import copy
import json
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from smallcap.errors import ConfigError
from smallcap.option_files import parse_value, read_option_file

ConfigT = TypeVar("ConfigT", bound="Config")
Place = Literal["uri", "model", "encoder"]

_LARGEST_NUMBER = 2**53  # up to it a number is the same as an integer and as a float; no option needs a larger one
_PLAIN = (str, int, float, list, tuple, type(None))  # pydantic would take a mapping or bytes for a list
_CONTROL_CODES = re.compile("[\x00-\x1f\x7f-\x9f]")
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are not UTF-8, too


@dataclass(frozen=True)
class Flag:
    """How the command line names a field, if not simply `--its-name`; an entry of the field's `Annotated`."""

    names: tuple[str, ...] = ()  # such as -k and --k; empty for the field's own name
    has_commas: bool = False  # one flag may name several values: a,b,c
    is_positional: bool = False
    any_text: bool = False  # it may hold control codes, as the names of existing files and tokens do
    place: Place | None = None  # what kind of place it names; see `smallcap.option_places`


POSITIONAL = Flag(is_positional=True)
POSITIONAL_FILES = Flag(is_positional=True, any_text=True, place="uri")
URI, MODEL, ENCODER = Flag(place="uri"), Flag(place="model"), Flag(place="encoder")


class Config(BaseModel):
    """Base of all option groups: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _is_no_junk(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Refuses what pydantic would take, and what no option can mean: true as a number, text that is not a name."""
        field = cls.model_fields[info.field_name or ""]
        is_no_switch = isinstance(value, bool) and field.annotation is not bool
        if is_no_switch or not (isinstance(value, _PLAIN) or _is_group(field.annotation)):
            raise PydanticCustomError("wrong_kind", "another kind of value")
        result = validate(value)
        for part in result if isinstance(result, tuple) else [result]:
            if isinstance(part, str):
                _check_text(part, _flag_of(field).any_text)
            elif isinstance(part, int | float) and abs(part) > _LARGEST_NUMBER:
                raise ValueError(f"a number between -{_LARGEST_NUMBER:,} and {_LARGEST_NUMBER:,}")
        return result


def _check_text(text: str, any_text: bool) -> None:
    if not (text if any_text else text.strip()):
        raise ValueError("a text that is not empty")
    if _HALF_CHARACTERS.search(text):
        raise ValueError("a text in UTF-8")
    if "\0" in text or (not any_text and _CONTROL_CODES.search(text)):
        raise ValueError("a text without control codes")


@dataclass(frozen=True)
class Option:
    """One option of a job or of a look-up."""

    key: str  # dotted, as in config files and for --set
    group: type[Config]  # the class that declares it
    names: tuple[str, ...]  # its flags; for a positional argument its placeholder, such as IMAGES
    summary: str  # its docstring, as one line
    values: str  # allowed values in words; empty for free text and for switches
    default: str  # as a user types it; empty for `None`, an empty list and a switch that is off
    default_value: Any  # None where it is required
    is_required: bool
    is_positional: bool
    is_switch: bool  # its flag takes no value
    is_list: bool  # its flag may be repeated
    has_commas: bool  # its flag may name several values: a,b,c
    any_text: bool  # it may hold control codes
    place: Place | None  # a URI or path, a model (its folder, or its name), or the spec of a retrieval encoder


def list_options(kind: type[Config], prefix: str = "") -> Iterator[Option]:
    """Yields all options of a config class, those of its groups last.

    Args:
        kind: The class.
        prefix: Dotted names of the groups that hold it, with a dot at the end.
    """
    groups = {}
    for name, field in kind.model_fields.items():
        if _is_group(field.annotation):
            groups[f"{prefix}{name}."] = field.annotation
        else:
            yield _describe_field(f"{prefix}{name}", kind, field)
    for inner, group in groups.items():
        yield from list_options(group, inner)


def _is_group(annotation: Any) -> TypeGuard[type[Config]]:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _flag_of(field: FieldInfo) -> Flag:
    return next((entry for entry in field.metadata if isinstance(entry, Flag)), Flag())


def _describe_field(key: str, group: type[Config], field: FieldInfo) -> Option:
    flag = _flag_of(field)
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
        default_value=None if field.is_required() else field.default,
        is_required=field.is_required(),
        is_positional=flag.is_positional,
        is_switch=field.annotation is bool,
        is_list=is_list,
        has_commas=flag.has_commas or (is_list and values.startswith("one of")),
        any_text=flag.any_text,
        place=flag.place,
    )


def _describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe_type(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        return " or ".join(_describe_type(kind, metadata) for kind in arguments if kind is not type(None))
    if origin is Literal:
        return str(arguments[0]) if len(arguments) == 1 else f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return _describe_type(arguments[0])
    noun = {int: "a whole number", float: "a number"}.get(annotation, "")
    return noun + _describe_bounds(metadata) if noun else ""


def _describe_bounds(metadata: Sequence[Any]) -> str:
    entries = [inner for entry in metadata for inner in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = {name: f"{getattr(entry, name):,}" for entry in entries for name in words if hasattr(entry, name)}
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
    options = list(list_options(kind))
    values |= _filled_in(read_option_file(file), options) if file else {}
    given_as: dict[str, str] = {}  # where the values come from, if not from the file
    names = {option.key: option.names[-1] for option in options}
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(values, key, value)
            given_as[key] = names.get(key, key)
    for setting in sets:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not all(key.split(".")):
            raise ConfigError("--set needs a name and a value.", where=shown(setting), expected="--set a.b=c")
        _assign(values, key, parse_value(text, f"--set {key}"))
        given_as[key] = key
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _as_config_error(kind, error, values, given_as, file) from error


def _filled_in(values: dict[str, Any], options: Sequence[Option]) -> dict[str, Any]:
    """Leaves out what is required and stands in a file without a value, as in one of `smallcap config init`."""
    empty = {option.key for option in options if option.is_required and values.get(option.key, "") is None}
    return {key: value for key, value in values.items() if key not in empty}


def list_settings(config: Config) -> list[tuple[str, str]]:
    """Returns the keys of all options of a config with their values as JSON."""
    values = _flatten(config.model_dump(mode="json"))
    return [(key, json.dumps(value, ensure_ascii=False)) for key, value in values]


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


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                "A setting names an option inside another that is not a group.", where=key, found=shown(inner)
            )
        values = inner
    values[name] = value


def _as_config_error(
    kind: type[Config], error: ValidationError, values: dict[str, Any], given_as: Mapping[str, str], file: str | None
) -> ConfigError:
    """Says in plain words what is wrong: an unknown key, all that is missing, or a wrong value.

    Args:
        kind: The config class.
        error: pydantic's report.
        values: What was to be a config.
        given_as: The names under which options were given, for those that are not from the file.
        file: The config file.
    """
    options = {option.key: option for option in list_options(kind)}
    problems = [(problem["type"], [str(step) for step in problem["loc"]], problem) for problem in error.errors()]
    unknown = next((path for fault, path, _ in problems if fault in ("extra_forbidden", "invalid_key")), None)
    if unknown:
        return _unknown_key(".".join(unknown), options)
    if missing := [options[".".join(path)] for fault, path, _ in problems if fault == "missing"]:
        wrong = [_option_at(path, options) for fault, path, _ in problems if fault != "missing"]
        return _missing(kind, missing, {option.key for option in wrong if option}, values, file)
    fault, path, problem = problems[0]
    reason, found = problem["msg"].removeprefix("Value error, "), shown(problem["input"])
    option = _option_at(path, options)
    key = option.key if option else ".".join(path)
    where = given_as.get(key, f"{key} in {file}" if file and key else key)
    if option is not None:
        is_no_list = key == ".".join(path) and not isinstance(problem["input"], list | tuple)
        expected = reason if fault == "value_error" else _expected(option, is_no_list, problem.get("ctx", {}))
        return ConfigError("An option's value is wrong.", where=where, expected=expected, found=found)
    if fault == "value_error":
        return ConfigError("The options do not fit together.", where=where or file or "", expected=reason)
    expected = f"a mapping with {', '.join(_siblings(f'{key}.', options))}"
    return ConfigError("A group of options has no options in it.", where=where, expected=expected, found=found)


def _option_at(path: Sequence[str], options: Mapping[str, Option]) -> Option | None:
    """Returns the option that pydantic means; a place in a list, or a type, may follow its key."""
    keys = (".".join(path[:end]) for end in range(len(path), 0, -1))
    return next((options[key] for key in keys if key in options), None)


def _expected(option: Option, is_no_list: bool, bounds: Mapping[str, Any]) -> str:
    """Returns in words what an option may be; `bounds` are those that pydantic names, with the length of a list."""
    kind = "true or false" if option.is_switch else option.values or "text"
    if option.is_list and is_no_list:
        return f"a list such as [a, b], each {kind}"
    words = {"min_length": "at least", "max_length": "at most"}
    return next((f"{word} {bounds[name]} of them" for name, word in words.items() if name in bounds), kind)


def _missing(
    kind: type[Config], missing: Sequence[Option], wrong: Collection[str], values: dict[str, Any], file: str | None
) -> ConfigError:
    """Names all that is missing: required options, and what the options as a whole would lack if they were there.

    Args:
        kind: The config class.
        missing: The required options.
        wrong: Keys of options whose values are wrong; they are told once nothing is missing.
        values: What was to be a config.
        file: The config file.
    """
    filled: dict[str, Any] = {}
    for key, value in _flatten(values):
        if key not in wrong:
            _assign(filled, key, value)
    for option in missing:
        _assign(filled, option.key, ["given"] if option.is_list else "given")
    besides = ""
    try:
        kind.model_validate(filled)
    except ValidationError as error:
        reasons = [problem["msg"] for problem in error.errors() if problem["type"] == "value_error"]
        besides = f" Besides, {reasons[0].removeprefix('Value error, ')}." if reasons else ""
    *first, last = (option.names[-1] for option in missing)
    return ConfigError(
        "Options are missing." if first else "An option is missing.",
        where=file or "",
        remedy=f"Give {', '.join(first)}{' and ' if first else ''}{last}.{besides}",
    )


def shown(value: Any) -> str:
    """Returns a value as a person gave it, in a line of bounded length."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of many thousand digits
        return "a very large number"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def _unknown_key(key: str, options: Mapping[str, Option]) -> ConfigError:
    """Lists the valid keys of the same group, and names the nearest one, in another group if need be."""
    group, _, name = key.rpartition(".")
    prefix = f"{group}." if group else ""
    siblings = _siblings(prefix, options)
    others = {valid.rpartition(".")[2]: valid for valid in options}
    nearest = [prefix + close for close in get_close_matches(name, siblings, n=1)]
    nearest += [others[close] for close in get_close_matches(name, others, n=1)]
    return ConfigError(
        "There is no such option.",
        where=key if key.isprintable() else shown(key),
        expected=", ".join(siblings),
        remedy=f"Did you mean {nearest[0]}?" if nearest else "",
    )


def _siblings(prefix: str, options: Mapping[str, Option]) -> list[str]:
    """Returns the names of a group's options and groups, sorted."""
    return sorted({valid.removeprefix(prefix).partition(".")[0] for valid in options if valid.startswith(prefix)})
