"""What the records of all jobs share: what is pinned for a run, and the check that a command continues it."""

from __future__ import annotations

import os
import platform
import re
import uuid
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from smallcap import storage
from smallcap.errors import ConfigError, ManifestError
from smallcap.index.manifest import (
    IndexManifest,
    join_index_ids,
    load_manifests,
    load_pointer,
    manifest_uri,
    split_index_ids,
)
from smallcap.model.encoder_spec import check_encoder_spec, resolve_encoder_identity
from smallcap.model.files import checkpoint_sha256
from smallcap.option_places import absolute_place, absolute_places
from smallcap.options import Config, config_difference, load_config
from smallcap.records import VersionedRecord
from smallcap.redaction import without_secrets

_PACKAGES = ("smallcap", "torch", "transformers", "open_clip_torch", "pyarrow", "ray")


class PinnedRecord(VersionedRecord):
    """What the first attempt of a run settles for all its attempts."""

    run_id: str
    status: Literal["running", "stopped", "complete"] = "running"  # `stopped` by a signal; `running` also if killed
    config: dict[str, Any]
    index_id: str | None  # of several indexes, see `smallcap.index.manifest.join_index_ids`
    retrieval_encoder: str | None
    versions: dict[str, str]  # of Python and of the packages that decide the results

    @classmethod
    def new(cls, config: Config, index_id: str | None, retrieval_encoder: str | None, **pinned: Any) -> Self:
        """Returns the record of a new run; `pinned` are the required fields of the subclass."""
        return cls(
            run_id=uuid.uuid4().hex[:12],
            config=absolute_places(type(config), config.model_dump(mode="json")),
            index_id=index_id,
            retrieval_encoder=retrieval_encoder,
            versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            **pinned,
        )


def recorded_options(record: PinnedRecord, kind: type[Config], out: str) -> dict[str, Any]:
    """Returns the recorded config of a run, with absolute places.

    Records of before 0.1.0 have paths as they were typed. Where the run's folder still ends as they say, they start
    from the folder in which the run began; otherwise from the working directory.

    Args:
        record: The run's record.
        kind: The class of its config.
        out: The run's folder.
    """
    return absolute_places(kind, record.config, _began_in(record, out))


def pinned_encoder(record: PinnedRecord, out: str) -> str | None:
    """Returns the retrieval encoder of a run, with an absolute path if it has one; see `recorded_options`."""
    spec = record.retrieval_encoder
    return None if spec is None else absolute_place(spec, "encoder", _began_in(record, out))


def _began_in(record: PinnedRecord, out: str) -> str:
    """Returns the folder that the relative paths of a record start from; empty for the working directory."""
    typed, now = os.path.normpath(str(record.config.get("out") or ".")), storage.absolute(out)
    is_below = storage.is_local(out) and not Path(typed).is_absolute() and now.endswith(f"/{typed}")
    return now.removesuffix(typed) if is_below else ""


def check_indexes_are_there(record: PinnedRecord, indexes: Sequence[str]) -> None:
    """Checks that the versions of the indexes with which a run began can still be read.

    Raises:
        ManifestError: One is gone.
    """
    for index_id, index in zip(split_index_ids(record.index_id), indexes, strict=False):  # none without retrieval
        if not storage.exists(manifest_uri(index, index_id)):
            raise _gone(index, index_id)


def _gone(index: str, index_id: str) -> ManifestError:
    try:
        found = f"the current version {load_pointer(index).index_id}"
    except ManifestError:
        found = "no published index"
    return ManifestError(
        "The run's index version is gone.",
        where=index,
        expected=f"version {index_id}, with which the run began; all its rows come from one version",
        found=found,
        remedy="Put it back where it was, if `smallcap index gc` has not removed it but the index was moved. Otherwise "
        "give another --out, which takes the current version.",
    )


def check_required_index(required: str | None, indexes: Sequence[str], k: int | None, pinned: str | None) -> None:
    """Checks that a run uses the version of the index that its command requires, or those of several.

    Args:
        required: The version's id, or those of several as `join_index_ids` writes them; None requires none.
        indexes: The indexes' URIs.
        k: Captions to retrieve; 0 for none, None for the model's own number.
        pinned: The version with which the run began; None for a new run, which takes the current one.

    Raises:
        ConfigError: It uses another one, or no index.
        ManifestError: There is no published index.
    """
    if required is None:
        return
    found = pinned or (join_index_ids(list(map(load_pointer, indexes))) if k != 0 else None)
    if found != required:
        raise ConfigError(
            "The index is not of the version that is required.",
            where=" and ".join(indexes) or "--index",
            expected=f"version {required} (--require-index-id)",
            found=f"version {found}{', with which this run began' if pinned else ''}" if found else "no index is used",
            remedy="If that version is published there, `smallcap index use` makes it the current one."
            if found and not pinned
            else "",
        )


def check_required_model(required: str | None, model: str | None, cache_dir: str) -> None:
    """Checks that the sha256 of a checkpoint's weights begins as the command requires; None requires nothing.

    Raises:
        ConfigError: It does not.
        CheckpointError, StorageError: The checkpoint cannot be found or fetched.
    """
    if required is None or model is None:
        return
    sha256 = checkpoint_sha256(model, cache_dir)
    if not sha256.startswith(required):
        raise ConfigError(
            "The model's weights are not those that are required.",
            where=model,
            expected=f"sha256 {required} (--require-model-hash)",
            found=f"sha256 {sha256}",
            remedy="Give the model with this checksum. If its weights were changed on purpose, require the new one.",
        )


def pin_indexes(
    indexes: Sequence[str], k: int | None, encoder: str | None, cache_dir: str
) -> tuple[tuple[IndexManifest, ...], str | None]:
    """Returns the versions of the indexes that a new run is to use, if it retrieves, and the spec of their encoder.

    Args:
        indexes: The indexes' URIs.
        k: Captions to retrieve; 0 for none, None for the model's own number.
        encoder: The encoder that is asked for; by default the indexes'.
        cache_dir: This node's cache folder.

    Raises:
        ConfigError: The encoder's spec is wrong, or the indexes have different ones.
        RunError: The index or the encoder cannot be used, or they do not belong together.
    """
    if encoder is not None:
        check_encoder_spec(encoder)  # before the index is looked at
    manifests = load_manifests(indexes) if k != 0 else ()
    spec = encoder or (manifests[0].encoder.spec if manifests else None)
    spec = absolute_place(spec, "encoder") if spec else None  # for the record, which is read in other folders as well
    if manifests and spec:
        identity = resolve_encoder_identity(spec, cache_dir)
        for manifest, index in zip(manifests, indexes, strict=True):
            manifest.check_encoder(identity, index)
    return manifests, spec


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
    kind = type(config)
    recorded = recorded_options(record, kind, out)
    with_defaults = load_config(kind, base=recorded).model_dump(mode="json")
    given_options = without_secrets(absolute_places(kind, config.model_dump(mode="json")))  # as they are recorded
    changes = config_difference(with_defaults, given_options, free)
    if not changes and _checksums(given := weights[1]()) != _checksums(weights[0]):
        changes.append(f"model weights: {weights[0]} → {given}")
    if changes:
        raise ConfigError(
            "The output folder holds a run with other options.",
            where=out,
            found="; ".join(changes),
            remedy="Start again with the options of that run, or give another --out.",
        )


def _checksums(model_id: str) -> list[str]:
    """Returns the checksums in a model's id; the name beside them depends on how its folder was typed."""
    return re.findall("@([0-9a-f]+)", model_id)
