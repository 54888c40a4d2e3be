"""The plain command line of a job under `ray job submit`: `python -m jobs.NAME --config FILE --set a.b=c`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

from smallcap.config import Config, load_config
from smallcap.errors import ConfigError, RunError

ConfigT = TypeVar("ConfigT", bound=Config)

EXIT_RUN_ERROR = 1
EXIT_USAGE = 2


def run_job(kind: type[ConfigT], run: Callable[[ConfigT, str | None], str]) -> None:
    """Reads the job's config from the command line, runs it, prints its result, and exits with its status.

    Args:
        kind: The job's config class.
        run: Takes the config and the address of a Ray cluster; returns what to print.
    """
    parser = argparse.ArgumentParser(description=(kind.__doc__ or "").strip())
    parser.add_argument("--config", help="URI of a YAML file with the job's options")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="a.b=c", help="set one option")
    parser.add_argument("--address", help="Ray cluster; by default the one the job was submitted to")
    arguments = parser.parse_args()
    try:
        print(run(load_config(kind, arguments.config, sets=arguments.sets), arguments.address))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_RUN_ERROR)
