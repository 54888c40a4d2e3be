"""The options of commands besides a job's config: those of one call of a job, and those of look-ups.

They are not recorded with a run. Nothing heavy is imported here, so that help and usage errors come quickly.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from jobs.cluster.addresses import check_form
from smallcap.config import Device
from smallcap.hub import is_on_hub
from smallcap.options import POSITIONAL, Config, Flag
from smallcap.storage import DEFAULT_CACHE_DIR

AsJson = Annotated[bool, Flag(("--json",))]
RayAddress = Annotated[str | None, AfterValidator(check_form)]
ExportKind = Literal["jsonl", "csv", "card", "iceberg", "delta", "lance", "hf", "webdataset"]
ConfigJob = Literal["caption", "refresh", "forget", "build-index", "train", "evaluate", "bench"]


class PrintOptions(Config):
    """What a command prints, and where; every command has these."""

    quiet: Annotated[bool, Flag(("-q", "--quiet"))] = False
    """Print only warnings, errors and the result."""
    verbose: Annotated[bool, Flag(("-v", "--verbose"))] = False
    """Print the settings, the plan and each step as well."""
    log_file: str | None = None
    """File on this machine to which everything is appended that is printed, with the time; also what `-q` leaves
    out."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.quiet and self.verbose:
            raise ValueError("--quiet prints less and --verbose prints more: give one of them")
        return self


class StorageOptions(Config):
    """How storage is used; every command has these."""

    storage_patience_s: float | None = Field(None, ge=0, le=604_800)
    """Seconds for which storage that fails is asked again before the command gives up; by default the environment's
    SMALLCAP_STORAGE_PATIENCE_S, or else 300. What is missing or forbidden is asked for once; `doctor` never waits."""


class JobCall(Config):
    """Where a job's options come from."""

    config: str | None = None
    """YAML file with options, at any URI. Flags win over it."""
    settings: Annotated[tuple[str, ...], Flag(("--set",), any_text=True)] = ()
    """Any option by its key, as `a.b=c`; the value is YAML, and wins over a flag."""


class RayCall(JobCall):
    """Where a job's options come from, where it runs, and what it tells programs."""

    dry_run: bool = False
    """Say what there is to do and what it takes; write nothing to the output."""
    as_json: AsJson = False
    """Print one JSON object as the last line of stdout, and everything else to stderr."""
    address: RayAddress = None
    """Ray cluster's HOST:PORT, or `local`; by default RAY_ADDRESS, the Ray that runs here, or else a new local one."""
    lineage: bool = False
    """Send OpenLineage events of what is read and written, to where OPENLINEAGE_URL or `openlineage.yml` says."""


class CaptionCall(RayCall):
    """One call of the captioning job."""

    gpu_hour_cost: float | None = Field(None, ge=0)
    """With `--dry-run`: cost of a GPU for an hour, in $."""
    retry_failed: bool = False
    """Try failed images again. The run's folder is enough: the recorded options apply."""
    relist: bool = False
    """List the input again: add new images, and caption those again whose files or objects were overwritten since."""
    variant: Annotated[tuple[str, ...], Flag(any_text=True)] = ()
    """Caption in several ways in one pass, which loads each image once: `NAME:k=0,num_beams=8`. Each way is a run in
    the folder NAME of `--out`, with its own model, k, prompt or decoding; other options hold for all."""

    @model_validator(mode="after")
    def _plans_one_run(self) -> Self:
        if self.variant and self.dry_run:
            raise ValueError("a dry run plans one run: leave --variant out")
        return self


class EvaluateCall(JobCall):
    """One call of the evaluation job."""

    as_json: AsJson = False
    """Print one JSON object as the last line of stdout, and everything else to stderr."""


class BenchCall(JobCall):
    """One call of the benchmark."""

    json_file: Annotated[str | None, Flag(("--json",))] = None
    """File to which the line of JSON is written. Then stdout has only this line, and everything else goes to
    stderr."""


class DemoOptions(Config):
    """The demo."""

    out: str = "out/demo"
    """Folder for the demo's indexes and captions."""
    show: int = Field(6, ge=0)
    """Number of images to show."""
    address: RayAddress = None
    """Ray cluster's HOST:PORT, or `local`; by default RAY_ADDRESS, the Ray that runs here, or else a new local one."""


class ConfigInitOptions(Config):
    """A config file to fill in."""

    job: Annotated[ConfigJob, POSITIONAL]
    """The command that the file is for."""
    out: str | None = None
    """File to write, which must not exist; by default the text is printed."""


class SearchOptions(Config):
    """One search in an index."""

    index: str
    """Published index."""
    image: Annotated[str | None, Flag(any_text=True)] = None
    """Image to search with."""
    text: Annotated[str | None, Flag(any_text=True)] = None
    """Text to search with."""
    k: Annotated[int, Flag(("-k", "--k"))] = Field(10, ge=1, le=10_000)
    """Number of captions to find."""
    encoder: str | None = None
    """Retrieval encoder: `open_clip:MODEL/PRETRAINED` or `hf:ID-PATH-OR-URI`; by default the index's encoder."""
    as_json: AsJson = False
    """Print JSON."""

    @model_validator(mode="after")
    def _has_one_query(self) -> Self:
        if (self.image is None) == (self.text is None):
            raise ValueError("a search takes one query: give either --image or --text")
        return self


class InspectOptions(Config):
    """A look at what smallcap has written."""

    path: Annotated[str, POSITIONAL]
    """An index, a captioning run, a training run, a model, or WebDataset tars."""
    samples: int = Field(5, ge=0)
    """Number of rows to show."""
    errors: bool = False
    """List a run's failed images and the reasons, in place of sample rows."""
    as_json: AsJson = False
    """Print JSON."""


class ExportOptions(Config):
    """A copy of a run's captions."""

    run: Annotated[str, POSITIONAL]
    """A captioning run."""
    to: ExportKind
    """`jsonl` and `csv` copy the captions into a file. `iceberg`, `delta` and `lance` make a table of them, and `hf` a
    data set for Hugging Face's `datasets`. `webdataset` makes tars of images and captions. `card` describes the run in
    a README.md for the Hugging Face hub."""
    out: str
    """The file to write; `.gz` at its end compresses it. For `delta`, `lance`, `hf` and `webdataset` a folder, for `hf`
    also hf://datasets/USER/NAME, and for `iceberg` CATALOG.NAMESPACE.TABLE."""
    columns: Annotated[tuple[str, ...], Flag(has_commas=True)] = ()
    """Columns to copy, in this order: `a,b,c`; by default all."""
    failed: bool = False
    """Copy failed images as well, with their error codes."""
    raw: bool = False
    """Leave texts in CSV as they are. Otherwise an apostrophe precedes those that a spreadsheet would run as
    formulas."""
    images: bool = True
    """Put the images into tars. The run's own tars are copied, or else each image is fetched again."""

    @model_validator(mode="after")
    def _fits_the_format(self) -> Self:
        if self.to == "webdataset" and self.failed:
            raise ValueError("tars have captioned images only: leave out --failed")
        if self.to != "webdataset" and not self.images:
            raise ValueError("only tars have images: --no-images is for --to webdataset")
        if self.to != "hf" and is_on_hub(self.out):
            raise ValueError("only --to hf writes to the Hugging Face Hub")
        return self


class ReportOptions(Config):
    """A page about a run or an index."""

    path: Annotated[str, POSITIONAL]
    """A captioning run, or an index."""
    other: Annotated[str | None, POSITIONAL] = None
    """Another run, to be shown beside the first."""
    out: str = "report.html"
    """The HTML file to write."""
    rows: int = Field(2000, ge=1, le=10_000)
    """Most images or captions to show. Where there are more, some are drawn. The more there are, the smaller are the
    pictures, so that a page stays below 25 MB."""


class FilterOptions(Config):
    """The rows of a run that are good enough."""

    run: Annotated[str, POSITIONAL]
    """A captioning run."""
    out: str
    """The Parquet file to write. Images without a caption, and empty captions, never get there."""
    min_clip_score: float | None = Field(None, ge=-1, le=1)
    """The least `clip_score`."""
    max_copied: float | None = Field(None, ge=0, le=1)
    """The largest `copied_share`. Captions of images without retrieved captions pass."""
    min_retrieval_score: float | None = Field(None, ge=-1, le=1)
    """The least `retrieval_score`."""
    min_agreement: float | None = Field(None, ge=0, le=1)
    """The least `neighbour_agreement`."""
    as_json: AsJson = False
    """Print JSON."""


class CalibrateOptions(Config):
    """A search for bounds on the scores of captions, by references."""

    run: Annotated[str, POSITIONAL]
    """Output of a captioning run whose images have references."""
    references: str
    """Reference captions: COCO captions or Karpathy's splits (.json), or a table of images and captions (.csv, .tsv,
    .jsonl, .parquet)."""
    split: str | None = None
    """One of Karpathy's splits, such as `val`; by default all."""
    text_column: str = "caption"
    """Column of a table that holds the reference caption."""
    image_id_column: str = "image"
    """Column of a table that holds the image's file name or id."""
    keep: float = Field(0.9, gt=0, le=1)
    """The least share of the captions that a bound may accept."""
    bootstrap: int = Field(1000, ge=1, le=1_000_000)
    """Draws for the 95% confidence intervals."""
    seed: int = Field(0, ge=0)
    """Seed of the draws."""
    out: str | None = None
    """File for the result as JSON."""
    as_json: AsJson = False
    """Print the result as JSON on the last line."""


class TraceOptions(Config):
    """A search for the images whose prompts held certain captions; any of those that are named."""

    run: Annotated[str, POSITIONAL]
    """A captioning run."""
    source: tuple[str, ...] = ()
    """Captions of this dump, by its name in the index or its URI."""
    index: str | None = None
    """Of a run of several indexes, only captions of the index with this name; alone, all of them."""
    text: Annotated[tuple[str, ...], Flag(any_text=True)] = ()
    """Captions with this text; case, width and white space do not matter."""
    caption_id: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The caption with this id in the run's index version; of several indexes, in that of `--index`."""
    out: str = ""
    """File for the rows: JSON Lines, or CSV if it ends in `.csv`; `.gz` at its end compresses it."""
    show: int = Field(20, ge=0)
    """Number of rows to show."""
    as_json: AsJson = False
    """Print all rows as JSON."""

    @model_validator(mode="after")
    def _names_captions(self) -> Self:
        if not (self.source or self.text or self.caption_id or self.index):
            raise ValueError(
                "captions must be named: give --source, --text or --caption-id, or --index in a run of several indexes"
            )
        return self


class DoctorOptions(Config):
    """An examination of this machine, and of what a run on it is to use."""

    model: str = "demo"
    """Model to load: `demo`, a checkpoint's folder, prefix, or Hugging Face id."""
    index: str | None = None
    """Published index to look at."""
    retrieval_encoder: str | None = None
    """Retrieval encoder for the index; by default the one that it names."""
    storage: tuple[str, ...] = ()
    """Folder or prefix in which a small file is written, read, replaced on a condition, and deleted."""
    address: RayAddress = None
    """Address of a Ray cluster, whose nodes are asked what they have installed; by default a local Ray is tried."""
    device: Device = "auto"
    """Device to prove. `auto` takes a GPU if there is one, else the CPU."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Folder for copies of remote indexes and models."""
    quick: bool = False
    """Start no local Ray, and leave out what searches, captions and measures: a few seconds instead of a minute."""
    as_json: AsJson = False
    """Print JSON, an object per line."""


class IndexOptions(Config):
    """An index."""

    index: Annotated[str, POSITIONAL]
    """Published index."""


class IndexListOptions(IndexOptions):
    """A list of an index's versions."""

    as_json: AsJson = False
    """Print JSON."""


class IndexUseOptions(IndexOptions):
    """A change of an index's current version."""

    version: Annotated[str, POSITIONAL]
    """Id of a version, the beginning of one, or `previous`."""


class IndexGcOptions(IndexListOptions):
    """A removal of old versions."""

    grace: str = "1d"
    """Keep what was needed or written within this time, such as 90s, 30m, 12h, 7d."""
    keep: int = Field(1, ge=0)
    """Number of former versions to keep in any case."""
    dry_run: bool = False
    """Say what would be removed; remove nothing."""

    @field_validator("grace")
    @classmethod
    def _is_a_duration(cls, grace: str) -> str:
        if not re.fullmatch("[0-9]{1,6}[smhd]", grace):
            raise ValueError("a duration such as 90s, 30m, 12h or 7d")
        return grace
