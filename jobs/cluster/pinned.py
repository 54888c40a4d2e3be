"""What the records of all jobs share: what is pinned for a run, and the check that a command continues it."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Callable, Collection
from importlib.metadata import version
from typing import Any, Literal, Self

from smallcap.errors import ConfigError
from smallcap.index.manifest import IndexManifest, load_manifest
from smallcap.model.encoder_spec import check_encoder_spec, resolve_encoder_identity
from smallcap.options import Config, config_difference, load_config
from smallcap.records import VersionedRecord

_PACKAGES = ("smallcap", "torch", "transformers", "open_clip_torch", "pyarrow", "ray")


class PinnedRecord(VersionedRecord):
    """What the first attempt of a run settles for all its attempts."""

    run_id: str
    status: Literal["running", "stopped", "complete"] = "running"  # `stopped` by a signal; `running` also if killed
    config: dict[str, Any]
    index_id: str | None
    retrieval_encoder: str | None
    versions: dict[str, str]  # of Python and of the packages that decide the results

    @classmethod
    def new(cls, config: Config, index_id: str | None, retrieval_encoder: str | None, **pinned: Any) -> Self:
        """Returns the record of a new run; `pinned` are the required fields of the subclass."""
        return cls(
            run_id=uuid.uuid4().hex[:12],
            config=config.model_dump(mode="json"),
            index_id=index_id,
            retrieval_encoder=retrieval_encoder,
            versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            **pinned,
        )


def pin_index(index: str | None, k: int | None, encoder: str | None) -> tuple[IndexManifest | None, str | None]:
    """Returns the version of the index that a new run is to use, if it retrieves, and the spec of its encoder.

    Args:
        index: The index's URI.
        k: Captions to retrieve; 0 for none, None for the model's own number.
        encoder: The encoder that is asked for; by default the index's.

    Raises:
        ConfigError: The encoder's spec is wrong.
        RunError: The index or the encoder cannot be used, or they do not belong together.
    """
    if encoder is not None:
        check_encoder_spec(encoder)  # before the index is looked at
    manifest = load_manifest(index) if index and k != 0 else None
    spec = encoder or (manifest.encoder.spec if manifest else None)
    if manifest and spec:
        manifest.check_encoder(resolve_encoder_identity(spec), index or "")
    return manifest, spec


def check_same_options(
    record: PinnedRecord, config: Config, free: Collection[str], weights: tuple[str, Callable[[], str]], out: str
) -> None:
    """Checks that a command continues a run.

    Args:
        record: The run's record.
        config: The command's config.
        free: Dotted names of options that may differ between the attempts of one run.
        weights: Fingerprint of the run's model, and a function that returns that of the command's model. It is called
            only if the options agree: it reads the weights.
        out: The run's folder.

    Raises:
        ConfigError: The config or the model differs.
    """
    # A record lacks options that are newer than its run: they get their defaults.
    with_defaults = load_config(type(config), base=record.config).model_dump(mode="json")
    changes = config_difference(with_defaults, config.model_dump(mode="json"), free)
    if not changes and (given := weights[1]()) != weights[0]:
        changes.append(f"model weights: {weights[0]} → {given}")
    if changes:
        raise ConfigError(
            "The output folder holds a run with other options.",
            where=out,
            found="; ".join(changes),
            remedy="Start again with the options of that run, or give another --out.",
        )
