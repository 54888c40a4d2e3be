"""A captioning run's own record, `run.json`, and what its parts say is done.

The finished output is the checkpoint: which images are done is read from the parts' id column, and nothing else is
trusted. `run.json` pins what must not change while a run is stopped and started (config, model, index version).
"""

from __future__ import annotations

import fcntl
import io
import json
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from smallcap import storage
from smallcap.config import CaptionConfig, config_difference
from smallcap.errors import ConfigError, SchemaError, StorageError
from smallcap.schema import SCHEMA_VERSION, STATUS_OK, check_caption_schema, to_newest_version

RUN_FILE = "run.json"
RUN_FORMAT_VERSION = 3
_PACKAGES = ("smallcap", "torch", "transformers", "open_clip_torch", "pyarrow", "ray")
# What may differ between the attempts of one run: where it runs, and how much of its input it takes.
_FREE = tuple(f"compute.{name}" for name in ("device", "compile", "batch_size", "num_actors", "gpus_per_actor"))
_FREE += ("limit", "out", "retrieval.partitions", "retrieval.search_device")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Attempt(_Record):
    """One start of the job, and what it did."""

    started_at: str
    finished_at: str | None = None
    images: int = 0
    seconds: float | None = None  # wall clock of the pipeline, Ray's start and the models' loading included
    decode_s: float | None = None  # summed over CPU tasks
    caption_s: float | None = None  # summed over actors, loading excluded
    actors: int | None = None
    device: str | None = None
    dtype: str | None = None
    decoded_by_pillow: int | None = None  # images that decode: fast left to Pillow
    search_backends: tuple[str, ...] | None = None  # where the actors searched; several where they had unequal room


class ImageCounts(_Record):
    """The run's images by status."""

    total: int = 0
    ok: int = 0
    error: int = 0
    errors_by_code: dict[str, int] = {}


class RunRecord(_Record):
    """The content of `run.json`; older format versions lack some fields, whose defaults here are what held."""

    format_version: Literal[1, 2, 3] = 1
    schema_version: Literal[1, 2] = 1  # of the run's parts
    run_id: str
    status: Literal["running", "complete"] = "running"
    config: dict[str, Any]
    model_id: str
    index_id: str | None
    retrieval_encoder: str | None
    versions: dict[str, str]
    images: ImageCounts = ImageCounts()
    attempts: tuple[Attempt, ...] = ()

    @classmethod
    def new(
        cls, config: CaptionConfig, model_id: str, index_id: str | None, retrieval_encoder: str | None
    ) -> RunRecord:
        """Returns the record of a run that begins."""
        return cls(
            format_version=RUN_FORMAT_VERSION,
            schema_version=SCHEMA_VERSION,
            run_id=uuid.uuid4().hex[:12],
            config=config.model_dump(mode="json"),
            model_id=model_id,
            index_id=index_id,
            retrieval_encoder=retrieval_encoder,
            versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        )

    def check_same_run(self, config: CaptionConfig, model_id: str, out: str) -> None:
        """Checks that a command continues this run.

        Raises:
            ConfigError: Its config or its model differs, and mixing the two would make one output of two runs.
        """
        own = CaptionConfig.model_validate(self.config).model_dump(mode="json")  # with the defaults of newer options
        changes = config_difference(_pinned(own), _pinned(config.model_dump(mode="json")))
        if model_id != self.model_id:
            changes.append(f"model weights: {self.model_id} → {model_id}")
        if changes:
            raise ConfigError(
                "The output folder holds a run with other options.",
                where=out,
                found="; ".join(changes),
                remedy="Start again with the run's own options, or give another --out.",
            )


def load_run_record(out: str) -> RunRecord | None:
    """Loads a run's record; None where no run has begun.

    Raises:
        SchemaError: `run.json` is malformed, or of an unknown format version.
    """
    where = storage.join(out, RUN_FILE)
    if not storage.exists(where):
        return None
    try:
        values = json.loads(storage.read_bytes(where))
        if values.get("format_version") not in range(1, RUN_FORMAT_VERSION + 1):
            raise SchemaError(
                "run.json has an unknown format version.",
                where=where,
                expected=f"1 to {RUN_FORMAT_VERSION}",
                found=str(values.get("format_version")),
                remedy="Use the smallcap release that wrote it, or a newer one.",
            )
        return RunRecord.model_validate(values)
    except (ValueError, AttributeError, ValidationError) as error:
        raise SchemaError("run.json is malformed.", where=where, found=str(error)) from error


def write_run_record(out: str, record: RunRecord) -> None:
    """Writes `run.json`, atomically, in the newest format version."""
    record = record.model_copy(update={"format_version": RUN_FORMAT_VERSION})
    data = json.dumps(record.model_dump(mode="json"), indent=2) + "\n"
    storage.write_bytes(storage.join(out, RUN_FILE), data.encode())


@contextmanager
def run_lock(out: str) -> Iterator[None]:
    """Keeps a second driver of this machine out of the same output folder while the first one lives.

    An object store offers no such lock: there, `drop_duplicates` mends what two drivers wrote twice.

    Raises:
        ConfigError: Another driver holds the folder.
    """
    if not storage.is_local(out):
        yield
        return
    folder = Path(storage.absolute(out))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise StorageError("The output folder cannot be written.", where=out, found=str(error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                "Another process is writing to this output folder.", where=out, remedy="Wait for it, or stop it."
            ) from error
        yield


def list_parts(out: str) -> list[str]:
    """Lists a run's Parquet parts, oldest attempt first."""
    if not storage.exists(out):
        return []
    return [uri for uri in storage.list_files(out, (".parquet",)) if uri.rsplit("/", 1)[-1].startswith("part-")]


def read_parts(out: str, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Reads some columns of every part, one part at a time.

    Raises:
        SchemaError: A part is not Parquet, or not of a known schema version.
    """
    for uri in list_parts(out):
        with storage.open_file(uri) as file:
            try:
                part = pq.ParquetFile(file)
                check_caption_schema(part.schema_arrow, uri)
                known = [name for name in columns if name in part.schema_arrow.names]
                yield uri, to_newest_version(part.read(known)).select(columns)
            except pa.ArrowInvalid as error:
                raise SchemaError(
                    "A part cannot be read as Parquet.",
                    where=uri,
                    found=str(error),
                    remedy="smallcap writes parts whole; delete this one, and start the run again to redo its images.",
                ) from error


def finished_ids(out: str) -> pa.ChunkedArray:
    """Returns the ids of all images that have a row in the output, errors included."""
    return pa.chunked_array([c for _, t in read_parts(out, ["image_id"]) for c in t["image_id"].chunks], pa.string())


def count_images(out: str) -> ImageCounts:
    """Counts the output's rows by status and error code."""
    statuses: dict[str, int] = {}
    for _, table in read_parts(out, ["status", "error_code"]):
        for row in table.group_by(["status", "error_code"]).aggregate([([], "count_all")]).to_pylist():
            name = STATUS_OK if row["status"] == STATUS_OK else str(row["error_code"])
            statuses[name] = statuses.get(name, 0) + row["count_all"]
    ok = statuses.pop(STATUS_OK, 0)
    errors = sum(statuses.values())
    return ImageCounts(total=ok + errors, ok=ok, error=errors, errors_by_code=dict(sorted(statuses.items())))


def drop_duplicates(out: str) -> int:
    """Removes rows of images that an earlier part already has; returns how many there were.

    They arise when a worker of a killed driver outlives it and writes its part after the next attempt has begun.
    """
    seen = pa.array([], pa.string())
    dropped = 0
    for uri, table in read_parts(out, ["image_id"]):
        ids = table["image_id"].combine_chunks()
        again = pc.is_in(ids, value_set=seen)
        if count := pc.sum(again).as_py():
            dropped += count
            _keep_rows(uri, pc.invert(again))
        seen = pa.concat_arrays([seen, ids.filter(pc.invert(again))])
    return dropped


def _keep_rows(uri: str, keep: pa.BooleanArray) -> None:
    if not pc.any(keep).as_py():
        storage.remove(uri)
        return
    table = pq.read_table(io.BytesIO(storage.read_bytes(uri))).filter(keep)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(uri, buffer.getvalue())


def _pinned(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that all attempts of a run must share."""
    pinned = {group: dict(value) if isinstance(value, dict) else value for group, value in config.items()}
    for name in _FREE:
        group, _, option = name.partition(".")
        if option:
            pinned[group].pop(option, None)
        else:
            pinned.pop(group, None)
    return pinned
