"""What an option is: a field of a config class, and everything that a command line and a page say about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Config(BaseModel):
    """Base of all option groups: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Flag:
    """How a field is given on the command line, where that is not simply `--its-name`; goes into its `Annotated`."""

    names: tuple[str, ...] = ()  # such as -k and --k; none: the field's own
    commas: bool = False  # one flag may name several values: a,b,c
    positional: bool = False


POSITIONAL = Flag(positional=True)


@dataclass(frozen=True)
class Option:
    """One option of a job or of a look-up."""

    key: str  # dotted, as in config files and for --set
    group: type[Config]  # declares it
    field: FieldInfo

    @property
    def _flag(self) -> Flag:
        return next((entry for entry in self.field.metadata if isinstance(entry, Flag)), Flag())

    @property
    def names(self) -> tuple[str, ...]:
        """What stands before the value on the command line, or in its place for a positional argument: `IMAGES`."""
        name = self.key.rpartition(".")[2].replace("_", "-")
        return (name.upper(),) if self.is_positional else self._flag.names or (f"--{name}",)

    @property
    def is_positional(self) -> bool:
        """Whether it stands on the command line without a flag."""
        return self._flag.positional

    @property
    def is_switch(self) -> bool:
        """Whether its flag takes no value; `--no-…` turns it off."""
        return self.field.annotation is bool

    @property
    def is_list(self) -> bool:
        """Whether its flag may be repeated."""
        return get_origin(self.field.annotation) is tuple

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.field.is_required()

    @property
    def summary(self) -> str:
        """Its docstring as one line."""
        return " ".join((self.field.description or "").split())

    @property
    def default(self) -> str:
        """Its default as people type it; empty where it is `None`, an empty list or a switch that is off."""
        value = self.field.default
        if self.is_required or value is None or value is False:
            return ""
        return ",".join(value) if isinstance(value, tuple) else str(value).lower() if value is True else str(value)

    @property
    def values(self) -> str:
        """What it may be, in words; empty for free text and for switches."""
        return "" if self.is_switch else _describe_type(self.field.annotation, self.field.metadata)

    def split(self, given: list[str]) -> list[str]:
        """Returns the values of a repeated flag, and of words with commas where those are several values."""
        several = self._flag.commas or "one of" in self.values
        return [value for text in given for value in text.split(",")] if several else given


def list_options(kind: type[Config], prefix: str = "") -> Iterator[Option]:
    """Yields all options of a config class, those of its groups after its own.

    Args:
        kind: The class.
        prefix: Dotted names of the groups that hold it, each with its dot.
    """
    groups = {}
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Config):
            groups[f"{prefix}{name}."] = annotation
        else:
            yield Option(f"{prefix}{name}", kind, field)
    for inner, group in groups.items():
        yield from list_options(group, inner)


def _describe_type(annotation: Any, metadata: Any = ()) -> str:
    """Says in words which values a type takes; empty for free text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe_type(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        kinds = [_describe_type(kind, metadata) for kind in arguments if kind is not type(None)]
        return " or ".join(kinds)
    if origin is Literal:
        return str(arguments[0]) if len(arguments) == 1 else "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return _describe_type(arguments[0])
    noun = {int: "a whole number", float: "a number"}.get(annotation, "")
    return noun + _describe_bounds(metadata) if noun else ""


def _describe_bounds(metadata: Any) -> str:
    entries = [inner for entry in metadata for inner in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    names = ("ge", "gt", "le", "lt")
    bounds = {name: getattr(entry, name) for entry in entries for name in names if hasattr(entry, name)}
    if bounds.keys() == {"ge", "le"}:
        return f" from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    return ",".join(f" {words[name]} {bound}" for name, bound in bounds.items())
