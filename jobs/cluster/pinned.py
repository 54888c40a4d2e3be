"""What the records of all jobs share: the versions that a run was made with, and whether a command continues it."""

from __future__ import annotations

import platform
from collections.abc import Collection
from importlib.metadata import version
from typing import Any

from smallcap.errors import ConfigError
from smallcap.options import Config, config_difference

_PACKAGES = ("smallcap", "torch", "transformers", "open_clip_torch", "pyarrow", "ray")


def installed_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide a run's results."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def check_same_options(
    own: dict[str, Any], config: Config, free: Collection[str], weights: tuple[str, str], out: str
) -> None:
    """Checks that a command continues a run.

    Args:
        own: The run's config, as its record has it.
        config: The command's.
        free: Dotted names of the options that may differ between the attempts of one run.
        weights: What tells the run's model from others, and what tells the command's.
        out: The run's folder.

    Raises:
        ConfigError: Config or model differs.
    """
    with_new_defaults = type(config).model_validate(own).model_dump(mode="json")
    changes = config_difference(with_new_defaults, config.model_dump(mode="json"), free)
    if weights[0] != weights[1]:
        changes.append(f"model weights: {weights[0]} → {weights[1]}")
    if changes:
        raise ConfigError(
            "The output folder holds a run with other options.",
            where=out,
            found="; ".join(changes),
            remedy="Start again with the run's own options, or give another --out.",
        )
