"""The record of a captioning run, `_run.json`: what is pinned for all its attempts, and what each attempt did.

The record does not say which images are done: only the parts do (`smallcap.output.coverage`).
"""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import fstat
from os.path import samestat
from pathlib import Path
from typing import Literal

from pydantic import Field

from jobs.captioning.scores import Scores
from jobs.captioning.stage_report import Timeline
from jobs.cluster.pinned import PinnedRecord, check_same_options
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError, ConflictError, SchemaError, SmallCapError, StorageError
from smallcap.images.fragments import FragmentTable
from smallcap.images.sources import ARCHIVE, HIDDEN, NO_ENDING, NOT_LOOKED_INTO, OTHER_ENDING, PARQUET
from smallcap.images.work_list import WORK_FOLDER, WorkList
from smallcap.index.manifest import split_index_ids
from smallcap.output.coverage import Coverage
from smallcap.output.part_files import RUN_FILE, PartInfo
from smallcap.output.variant_runs import load_variants, name_variants
from smallcap.phrasing import describe_count, one_line
from smallcap.records import Record, load_record
from smallcap.retrieval_config import NamedIndex, as_uris, name_indexes

# Options that may differ between the attempts of one run: where it runs, how it fetches, how much input it takes.
_FREE = (
    *(f"compute.{name}" for name in ("device", "compile", "batch_size", "num_actors", "max_actors", "gpus_per_actor")),
    *(f"compute.{name}" for name in ("accelerator_type", "load_cpus", "stall_timeout_s")),
    *(f"input.{name}" for name in ("fetch_timeout_s", "fetch_attempts", "allow_private_hosts")),
    *(f"output.{name}" for name in ("rows_per_part", "rows_per_row_group")),
    *("limit", "max_error_rate", "out", "retrieval.partitions", "retrieval.search_device"),
    *("require_index_id", "require_model_hash"),
)


_NAMED, _SHOWN = 100, 3  # tars that are named in the record, and in the terminal
_REASONS = {
    HIDDEN: "with the ending of an image or a tar, but with a name or folder that begins with . or _",
    OTHER_ENDING: "with the ending of an image that is not taken from folders",
    NO_ENDING: "with the first bytes of an image and another ending; a list of URIs can name them",
    NOT_LOOKED_INTO: "with an unknown ending, whose first bytes were not read",
    ARCHIVE: "with the ending of an archive that is not read; unpack them, or pack them as .tar",
    PARQUET: "of Parquet with images, beside images or tars; name them as a source of their own",
}


class Attempt(Record):
    """One start of the job, and what it did."""

    token: str  # unique; see check_attempt
    started_at: str
    finished_at: str | None = None
    images: int = 0  # how many got their row
    seconds: float | None = None  # wall time, from the listing of the images on
    decode_s: float | None = None  # fetching and decoding, summed over CPU tasks
    fetch_s: float | None = None  # the share of fetching in decode_s
    fetch_retries: int | None = None  # requests that were repeated
    repeated_ids: int = 0  # in runs of before 0.1.0: images that came before in the same tar
    caption_s: float | None = None  # summed over actors, without loading the models
    write_s: float | None = None  # summed over the tasks that write parts
    actors: int | None = None  # the most at a time
    device: str | None = None
    dtype: str | None = None  # what the actors computed in; several where their GPUs differ
    decoded_by_pillow: int | None = None  # images that decode: fast left to Pillow
    search_backends: tuple[str, ...] | None = None  # where actors searched; several where memory differed
    timeline: Timeline | None = None  # images that each stage finished over time


class ImageCounts(Record):
    """The run's images by status."""

    total: int = 0
    ok: int = 0
    error: int = 0
    errors_by_code: dict[str, int] = Field(default_factory=dict)

    @classmethod
    def of(cls, parts: Iterable[PartInfo]) -> ImageCounts:
        """Sums the counts in the footers of parts."""
        ok, errors = 0, Counter[str]()
        for part in parts:
            ok += part.ok
            errors.update(part.errors)
        failed = errors.total()
        return cls(total=ok + failed, ok=ok, error=failed, errors_by_code=dict(sorted((+errors).items())))


class Input(Record):
    """The list of the run's images."""

    listed_at: str
    images: int | None  # None where there are uncounted tars
    fragments: int
    duplicates: int  # images named more than once, left out
    passed_over: dict[str, int] = Field(default_factory=dict)  # files like images that were left out, by the reason

    @classmethod
    def of(cls, work: WorkList) -> Input:
        """Returns the facts of a list of work."""
        return cls(
            listed_at=work.listed_at,
            images=work.images,
            fragments=len(work.fragments),
            duplicates=work.duplicates,
            passed_over=dict(work.passed_over),
        )


class TarContents(Record):
    """What tars that were read to their ends hold besides the run's images."""

    repeats: int = 0  # images that came before in the same tar, with the same name and content
    passed_over: dict[str, int] = Field(default_factory=dict)  # members like images that are none, by their tar

    @classmethod
    def of(cls, coverage: Coverage, fragments: FragmentTable) -> TarContents:
        """Sums what the footers of parts say, for each tar once."""
        counts = {fragments[number].uri: left_out for number, left_out in coverage.left_out.items()}
        passed_over = {uri: left_out.passed_over for uri, left_out in counts.items() if left_out.passed_over}
        repeats = sum(left_out.repeats for left_out in counts.values())
        return cls(repeats=repeats, passed_over=most_counted(passed_over))


class Account(Record):
    """What became of everything that looked like an image in the run's input, or in its first `limit` images."""

    seen: int
    captioned: int
    errors: int
    repeats: int
    passed_over: int

    def check(self, where: str) -> None:
        """Checks that nothing is missing.

        Raises:
            SchemaError: More or fewer images were seen than are accounted for.
        """
        accounted = self.captioned + self.errors + self.repeats + self.passed_over
        if self.seen != accounted:
            raise SchemaError(
                "The run's images do not add up.",
                where=where,
                expected=f"{self.seen:,}, which were listed or read",
                found=f"{self.captioned:,} captioned, {self.errors:,} errors, {self.repeats:,} repeats and "
                f"{self.passed_over:,} passed over",
                remedy="Run the same command again: images that have no row are captioned.",
            )


def most_counted(counts: Mapping[str, int]) -> dict[str, int]:
    """Returns the largest counts, and the sum of the others as `others`: a run can have very many tars."""
    ordered = Counter(counts).most_common()
    others = sum(count for _, count in ordered[_NAMED:])
    return dict(ordered[:_NAMED]) | ({"others": others} if others else {})


def describe_passed_over(counts: Mapping[str, int]) -> list[str]:
    """Returns lines for people about what looks like images and was not taken, by reason or tar."""
    lines: list[str] = []
    tars = {name: count for name, count in counts.items() if name not in _REASONS}
    for reason, text in _REASONS.items():
        if count := counts.get(reason):
            lines.append(f"Passed over: {describe_count(count, 'file')} {text}.")
    for name, count in Counter(tars).most_common(_SHOWN):
        members = f"{describe_count(count, 'file')} of {one_line(name.rpartition('/')[2])}"
        lines.append(f"Passed over: {members} like images, but hidden, links, or beside the image of their sample.")
    if len(tars) > _SHOWN:
        more = sum(tars.values()) - sum(count for _, count in Counter(tars).most_common(_SHOWN))
        lines.append(f"Passed over: {describe_count(more, 'such file')} of other tars.")
    return lines


class Refreshed(Record):
    """The run that a refresh began with, and what became of its rows."""

    run: str  # its folder, as it was then
    run_id: str
    index_id: str
    removed: tuple[str, ...] = ()  # what was removed from the index before, as `build-index --remove` names it
    carried: int | None = None  # rows whose prompts are the same; None while they are looked for
    changes: int | None = None  # rows of `_changes.parquet`, once it is written
    changed_captions: int | None = None  # those among them with another caption


class RunRecord(PinnedRecord):
    """The content of `_run.json`."""

    format_version: Literal[1] = 1
    model_id: str
    refreshed: Refreshed | None = None  # of a refresh
    model_sha256: str | None = None  # of the file of weights
    input: Input | None = None
    images: ImageCounts = ImageCounts()
    tars: TarContents = TarContents()  # at the end of the run
    repeated_ids: int = 0  # in runs of before 0.1.0: images whose id another file has
    account: Account | None = None  # of all images, at the end of the run
    scores: Scores | None = None  # of all captions, at the end of the run
    limit: int | None = None  # the option of the attempt that completed the run
    attempts: tuple[Attempt, ...] = ()

    @property
    def indexes(self) -> tuple[tuple[NamedIndex, str], ...]:
        """The indexes from which the run retrieves, and their versions; none without retrieval."""
        options = self.config["retrieval"]  # runs of before 0.1.0 have no names and weights
        named = name_indexes(
            as_uris(self.config["index"]), options.get("index_names", ()), options.get("index_weights", ())
        )
        return tuple(zip(named, split_index_ids(self.index_id), strict=False))

    def is_done(self, limit: int | None) -> bool:
        """Returns whether the first `limit` images of the run's list, or all images, have their rows."""
        listed = self.status == "complete" and self.input is not None
        return listed and (self.limit is None or (limit is not None and limit <= self.limit))

    def count_repeated(self) -> int:
        """Returns how many images were named more than once, in lists, within a tar, or in two files."""
        listed = self.input.duplicates if self.input else 0
        before = self.repeated_ids + sum(attempt.repeated_ids for attempt in self.attempts)
        return listed + before + self.tars.repeats

    def count_passed_over(self) -> dict[str, int]:
        """Returns how many files and members look like images but were not taken, by reason or tar."""
        return {**(self.input.passed_over if self.input else {}), **self.tars.passed_over}

    def check_same_run(self, config: CaptionConfig, model_id: Callable[[], str], out: str) -> None:
        """Checks that a command continues this run; `model_id` fingerprints its model.

        Raises:
            ConfigError: The config or the model differs, so that the output would mix two runs.
        """
        check_same_options(self, config, _FREE, (self.model_id, model_id), out)


def load_run_record(out: str) -> RunRecord | None:
    """Loads a run's record; returns None where no run has begun.

    Raises:
        SchemaError: `_run.json` is malformed, or of an unknown format version.
    """
    return load_record(RunRecord, storage.join(out, RUN_FILE), SchemaError)


def check_no_variants(out: str) -> None:
    """Checks that a folder for a new run is not one whose subfolders are the runs of variants.

    Raises:
        ConfigError: It is.
    """
    if names := load_variants(out):
        raise ConfigError(
            "The output folder holds variants.",
            where=out,
            expected="a folder for one run",
            found=", ".join(names),
            remedy="Give the command's --variant options as before, or another --out.",
        )


def load_existing_run(out: str) -> RunRecord:
    """Loads the record of a run that must be there.

    Raises:
        ConfigError: There is no run, or no folder is named.
        SchemaError: `_run.json` is malformed, or of an unknown format version.
    """
    record = load_run_record(out) if out else None
    if record is None:
        raise ConfigError(
            "There is no run in this folder.",
            where=out or "--out",
            expected=f"a folder with {RUN_FILE}",
            remedy=name_variants(out) if out else "",
        )
    return record


def write_run_record(out: str, record: RunRecord) -> None:
    """Writes `_run.json` atomically."""
    record.write(storage.join(out, RUN_FILE))


def check_attempt(out: str, attempt: Attempt) -> None:
    """Checks that an attempt is the run's newest, before it writes anything.

    The workers of a killed driver would otherwise go on writing. Of two drivers, the earlier one must stop.

    Raises:
        ConflictError: A later attempt has begun.
    """
    record = load_run_record(out)
    if record is None or not record.attempts or record.attempts[-1].token != attempt.token:
        raise ConflictError(
            "Another process has started this run again, so this one stops.",
            where=out,
            expected=f"the attempt of {attempt.started_at}",
            found=f"the attempt of {record.attempts[-1].started_at}"
            if record and record.attempts
            else f"no {RUN_FILE}",
            remedy="Let the other process finish.",
        )


@contextmanager
def run_lock(out: str, record_file: str = RUN_FILE, list_folder: str = WORK_FOLDER) -> Iterator[None]:
    """Keeps a second driver on this machine out of the output folder; a run that is refused leaves nothing in it.

    An object store has no such lock: there, `check_attempt` stops the earlier of two drivers.

    Args:
        out: The output folder.
        record_file: Name of the record, whose first writing begins a run.
        list_folder: Name of the folder with the lists that are made before.

    Raises:
        ConfigError: Another driver holds the folder.
    """
    with _locked(out) as lock:
        try:
            yield
        except BaseException:
            with suppress(SmallCapError):  # the error of the block matters more
                if not storage.exists(storage.join(out, record_file)):
                    storage.remove(storage.join(out, list_folder))
                    if lock is not None:
                        lock.unlink(missing_ok=True)
            raise


@contextmanager
def _locked(out: str) -> Iterator[Path | None]:
    """Yields the lock file of a local folder while it is held; a folder that was made and stays empty is removed."""
    if not storage.is_local(out):
        yield None
        return
    path = Path(storage.absolute(out)) / ".lock"
    with storage.no_empty_folders(out):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise StorageError("The output folder cannot be written.", where=out, found=str(error)) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held = path.exists() and samestat(path.stat(), fstat(file.fileno()))  # else it was just removed
            except BlockingIOError:
                is_held = False
            if not is_held:
                raise ConfigError(
                    "Another process is writing to this output folder.", where=out, remedy="Wait for it, or stop it."
                )
            yield path
