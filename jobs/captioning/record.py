"""A captioning run's own record, `run.json`: what is pinned for all of its attempts, and what each of them did.

Which images are done is not in it: that is read from the parts (`smallcap.output.coverage`), and nothing else is
trusted.
"""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from jobs.cluster.pinned import PinnedRecord, check_same_options
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError, ConflictError, SchemaError, StorageError
from smallcap.images.work_list import WorkList
from smallcap.output.part_files import PartInfo, damaged_part, list_parts
from smallcap.output.schema import check_caption_schema
from smallcap.records import Record, load_record

RUN_FILE = "run.json"
# What may differ between the attempts of one run: where it runs, how it fetches, and how much of its input it takes.
_FREE = (
    *(f"compute.{name}" for name in ("device", "compile", "batch_size", "num_actors", "max_actors", "gpus_per_actor")),
    *(f"input.{name}" for name in ("fetch_timeout_s", "fetch_attempts")),
    *(f"output.{name}" for name in ("rows_per_part", "rows_per_row_group")),
    *("limit", "max_error_rate", "out", "retrieval.partitions", "retrieval.search_device"),
)


class Attempt(Record):
    """One start of the job, and what it did."""

    token: str  # nobody else's; see check_attempt
    started_at: str
    finished_at: str | None = None
    images: int = 0  # that got their row
    seconds: float | None = None  # wall clock of the pipeline, Ray's start and the models' loading included
    decode_s: float | None = None  # fetching and decoding, summed over CPU tasks
    fetch_s: float | None = None  # of these, fetching
    fetch_retries: int | None = None  # requests that were repeated
    repeated_ids: int = 0  # images of tars that were left out, since another one of the same tar has the id
    caption_s: float | None = None  # summed over actors, loading excluded
    write_s: float | None = None  # summed over the tasks that write parts
    actors: int | None = None  # most at a time
    device: str | None = None
    dtype: str | None = None
    decoded_by_pillow: int | None = None  # images that decode: fast left to Pillow
    search_backends: tuple[str, ...] | None = None  # where the actors searched; several where they had unequal room


class ImageCounts(Record):
    """The run's images by status."""

    total: int = 0
    ok: int = 0
    error: int = 0
    errors_by_code: dict[str, int] = Field(default_factory=dict)

    @classmethod
    def of(cls, parts: Iterable[PartInfo]) -> ImageCounts:
        """Sums what the parts say of themselves."""
        ok, errors = 0, Counter[str]()
        for part in parts:
            ok += part.ok
            errors.update(part.errors)
        failed = errors.total()
        return cls(total=ok + failed, ok=ok, error=failed, errors_by_code=dict(sorted((+errors).items())))


class Input(Record):
    """The list of the run's images, as it was made."""

    listed_at: str
    images: int | None  # None where nobody knows how many there are in tars
    fragments: int
    duplicates: int  # named again, and left out

    @classmethod
    def of(cls, work: WorkList) -> Input:
        """Returns the facts of a list of work."""
        return cls(
            listed_at=work.listed_at, images=work.images, fragments=len(work.fragments), duplicates=work.duplicates
        )


class RunRecord(PinnedRecord):
    """The content of `run.json`."""

    format_version: Literal[1] = 1
    model_id: str
    input: Input | None = None
    images: ImageCounts = ImageCounts()
    repeated_ids: int = 0  # images of tars and Parquet files that were left out, since another file has the id
    limit: int | None = None  # of the attempt that made the run complete
    attempts: tuple[Attempt, ...] = ()

    def is_done(self, limit: int | None) -> bool:
        """Says whether the first `limit` images of the run's list, or all, have their rows already."""
        listed = self.status == "complete" and self.input is not None
        return listed and (self.limit is None or (limit is not None and limit <= self.limit))

    def count_repeated(self) -> int:
        """Returns how many images were named again, in lists, within a tar, or in two files."""
        listed = self.input.duplicates if self.input else 0
        return listed + self.repeated_ids + sum(attempt.repeated_ids for attempt in self.attempts)

    def check_same_run(self, config: CaptionConfig, model_id: str, out: str) -> None:
        """Checks that a command continues this run.

        Raises:
            ConfigError: Its config or its model differs, and mixing the two would make one output of two runs.
        """
        check_same_options(self, config, _FREE, (self.model_id, model_id), out)


def load_run_record(out: str) -> RunRecord | None:
    """Loads a run's record; None where no run has begun.

    Raises:
        SchemaError: `run.json` is malformed, or of an unknown format version.
    """
    return load_record(RunRecord, storage.join(out, RUN_FILE), SchemaError)


def load_run_config(out: str) -> dict[str, Any]:
    """Returns a run's own config, dumped.

    Raises:
        ConfigError: There is no run.
        SchemaError: `run.json` is malformed.
    """
    record = load_run_record(out) if out else None
    if record is None:
        raise ConfigError("There is no run in this folder.", where=out or "--out", expected=f"a folder with {RUN_FILE}")
    return record.config | {"out": out}


def write_run_record(out: str, record: RunRecord) -> None:
    """Writes `run.json`, atomically."""
    record.write(storage.join(out, RUN_FILE))


def check_attempt(out: str, attempt: Attempt) -> None:
    """Checks that an attempt is the run's newest, before anything of it is written.

    What a killed driver's workers still write would be work for nothing, and of two drivers one must stop.

    Raises:
        ConflictError: A later attempt has begun.
    """
    record = load_run_record(out)
    if record is None or not record.attempts or record.attempts[-1].token != attempt.token:
        raise ConflictError(
            "Another process has started this run again; this one stops.",
            where=out,
            expected=f"the attempt of {attempt.started_at}",
            found=f"one of {record.attempts[-1].started_at}" if record and record.attempts else "no run.json",
            remedy="Let the other one finish.",
        )


@contextmanager
def run_lock(out: str) -> Iterator[None]:
    """Keeps a second driver of this machine out of the same output folder while the first one lives.

    An object store offers no such lock: there, `check_attempt` stops the earlier of two drivers.

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


def read_parts(out: str, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Reads some columns of every part, one part at a time.

    Raises:
        SchemaError: A part is not Parquet, or not of this schema version.
    """
    for uri in list_parts(out):
        with storage.open_file(uri) as file:
            try:
                part = pq.ParquetFile(file)
                check_caption_schema(part.schema_arrow, uri)
                yield uri, part.read(columns).select(columns)
            except pa.ArrowInvalid as error:
                raise damaged_part(uri, error) from error
