"""What the records of all jobs share: what is pinned for a run, and whether a command continues it."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Collection
from importlib.metadata import version
from typing import Any, Literal, Self

from smallcap.config import Config, config_difference
from smallcap.errors import ConfigError
from smallcap.records import VersionedRecord

_PACKAGES = ("smallcap", "torch", "transformers", "open_clip_torch", "pyarrow", "ray")


class PinnedRecord(VersionedRecord):
    """What a run's first attempt settles for all of them."""

    run_id: str
    status: Literal["running", "complete"] = "running"
    config: dict[str, Any]
    index_id: str | None
    retrieval_encoder: str | None
    versions: dict[str, str]  # of Python and of the packages that decide a run's results

    @classmethod
    def new(cls, config: Config, index_id: str | None, retrieval_encoder: str | None, **pinned: Any) -> Self:
        """Returns the record of a run that begins; `pinned` are the subclass's required fields."""
        return cls(
            run_id=uuid.uuid4().hex[:12],
            config=config.model_dump(mode="json"),
            index_id=index_id,
            retrieval_encoder=retrieval_encoder,
            versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            **pinned,
        )


def check_same_options(
    record: PinnedRecord, config: Config, free: Collection[str], weights: tuple[str, str], out: str
) -> None:
    """Checks that a command continues a run.

    Args:
        record: The run's.
        config: The command's.
        free: Dotted names of the options that may differ between the attempts of one run.
        weights: What tells the run's model from others, and what tells the command's.
        out: The run's folder.

    Raises:
        ConfigError: Config or model differs.
    """
    with_defaults = type(config).model_validate(record.config).model_dump(mode="json")  # of options that came since
    changes = config_difference(with_defaults, config.model_dump(mode="json"), free)
    if weights[0] != weights[1]:
        changes.append(f"model weights: {weights[0]} → {weights[1]}")
    if changes:
        raise ConfigError(
            "The output folder holds a run with other options.",
            where=out,
            found="; ".join(changes),
            remedy="Start again with the run's own options, or give another --out.",
        )
