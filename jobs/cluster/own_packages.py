"""Keeps packages of the user's out of Ray's workers where they have the names of ours.

A worker looks for `jobs` first in the folder where its driver was started, and in the working directory of a submitted
job. What the driver sends it would then be looked for in a package of somebody else.
"""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from sys import path
from typing import Any

from smallcap.__main__ import BESIDE, import_own_packages


def worker_environment() -> dict[str, Any] | None:
    """Returns the runtime environment for this driver's workers; None where nothing has the names of our packages."""
    if all(map(_is_found_first, BESIDE)):
        return None
    hook = f"{import_own_packages.__module__}.{import_own_packages.__name__}"
    return {"worker_process_setup_hook": hook}


def _is_found_first(name: str) -> bool:
    own = import_module(name).__file__
    found = PathFinder.find_spec(name, [str(Path.cwd()), *path])
    assert own is not None, "it is not a namespace"
    return found is not None and found.origin is not None and Path(found.origin).samefile(own)
