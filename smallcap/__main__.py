"""The command line, `smallcap …` or `python -m smallcap …`: `jobs.cli`, from the package beside this one.

A folder of the user's may have a package `jobs` or `index_builder` too, and Python looks into the working directory and
PYTHONPATH first. So these packages are imported from beside this one before anything asks for them, here and in Ray's
workers (`jobs.cluster.own_packages`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

BESIDE = ("index_builder", "jobs")


def import_own_packages() -> None:
    """Imports the packages that are installed with this one, whatever else has their names."""
    for name in BESIDE:
        spec = PathFinder.find_spec(name, [str(Path(__file__).parents[1])])
        assert spec is not None and spec.loader is not None, "the three packages are installed together"
        if getattr(sys.modules.get(name), "__file__", None) != spec.origin:
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


def main() -> None:
    """Runs the command line."""
    import_own_packages()
    import_module("jobs.cli").main()


if __name__ == "__main__":
    main()
