"""Makes the places that options name independent of the folder in which a command is given."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallcap import storage
from smallcap.options import Config, Place, list_options

_ENCODER = re.compile("(hf:|open_clip:(?:local-dir:|[^:/]+/))(.+)")  # what precedes a path, and the path or name


def absolute_places(kind: type[Config], values: Mapping[str, Any], base: str = "") -> dict[str, Any]:
    """Returns a dumped config whose local paths are absolute.

    Args:
        kind: The config class, whose fields say which of them are places.
        values: The dumped config; it may lack options.
        base: The folder that relative paths start from; by default the working directory.
    """
    result: dict[str, Any] = copy.deepcopy(dict(values))
    for option in list_options(kind):
        *groups, name = option.key.split(".")
        group: dict[str, Any] = result
        for inner in groups:
            group = group.get(inner, {})
        if option.place is None or not (value := group.get(name)):
            continue
        is_list = isinstance(value, list | tuple)
        places = [absolute_place(one, option.place, base) for one in (value if is_list else [value])]
        group[name] = places if is_list else places[0]
    return result


def absolute_place(value: str, kind: Place, base: str = "") -> str:
    """Returns a place as an absolute one. The name of a model is a path only if a folder of that name exists."""
    if kind == "encoder":
        found = _ENCODER.fullmatch(value)
        if found is None:
            return value
        before, name = found.groups()
        if not storage.is_local(name):
            return before + storage.absolute(name)
        path = absolute_place(name, "uri", base)
        is_file = before.endswith("/")  # open_clip:MODEL/FILE, where a tag may stand as well
        return before + path if (Path(path).is_file() if is_file else Path(path).is_dir()) else value
    is_whole = value.startswith(("/", "~", "file://")) or not storage.is_local(value)
    path = storage.absolute(value if is_whole else str(Path(base, value)))
    return path if kind == "uri" or not storage.is_local(value) or (value != "demo" and Path(path).is_dir()) else value
