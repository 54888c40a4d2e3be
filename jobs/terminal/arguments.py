"""The plain command line of a job under `ray job submit`: `python -m jobs.NAME --config FILE --set a.b=c`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from smallcap.config import Config, load_config
from smallcap.errors import ConfigError, RunError

ConfigT = TypeVar("ConfigT", bound=Config)

EXIT_RUN_ERROR = 1
EXIT_USAGE = 2
EXIT_TOO_MANY_ERRORS = 3


def run_job(kind: type[ConfigT], run: Callable[..., tuple[str, int]], switches: Sequence[str] = ()) -> None:
    """Reads the job's config from the command line, runs it, prints its result, and exits with its status.

    Args:
        kind: The job's config class.
        run: Takes the config, the address of a Ray cluster, and the switches by name; returns what to print, and the
            exit status.
        switches: Names of further arguments of `run` that are true where `--NAME` is given.
    """
    parser = argparse.ArgumentParser(description=(kind.__doc__ or "").strip())
    parser.add_argument("--config", help="URI of a YAML file with the job's options")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="a.b=c", help="set one option")
    parser.add_argument("--address", help="Ray cluster; by default the one the job was submitted to")
    for name in switches:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    arguments = parser.parse_args()
    given: dict[str, Any] = {name: getattr(arguments, name) for name in switches}
    try:
        text, status = run(load_config(kind, arguments.config, sets=arguments.sets), arguments.address, **given)
        print(text)
        if status:
            sys.exit(status)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_RUN_ERROR)
