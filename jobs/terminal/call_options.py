"""The options of commands besides a job's config: those of one call of a job, and those of look-ups.

They are not recorded with a run. Nothing heavy is imported here, so that help and usage errors come quickly.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smallcap.config import Device
from smallcap.options import POSITIONAL, Config, Flag
from smallcap.storage import DEFAULT_CACHE_DIR

AsJson = Annotated[bool, Flag(("--json",))]


class JobCall(Config):
    """Where a job's options come from."""

    config: str | None = None
    """YAML file with options, at any URI. Flags win over it."""
    settings: Annotated[tuple[str, ...], Flag(("--set",))] = ()
    """Any option by its key, as `a.b=c`; the value is YAML, and wins over a flag."""


class RayCall(JobCall):
    """Where a job's options come from, and where it runs."""

    dry_run: bool = False
    """Say what there is to do and what it takes; write nothing to the output."""
    address: str | None = None
    """Address of a Ray cluster; by default the one to which the job was submitted, or a new local one."""


class CaptionCall(RayCall):
    """One call of the captioning job."""

    gpu_hour_cost: float | None = Field(None, ge=0)
    """With `--dry-run`: cost of a GPU for an hour, in $."""
    retry_failed: bool = False
    """Try failed images again. The run's folder is enough: the recorded options apply."""
    relist: bool = False
    """List the input again, and add new images."""


class EvaluateCall(JobCall):
    """One call of the evaluation job."""

    as_json: AsJson = False
    """Print the result as JSON on the last line."""


class BenchCall(JobCall):
    """One call of the benchmark."""

    json_file: Annotated[str | None, Flag(("--json",))] = None
    """File to which the line of JSON is written."""


class DemoOptions(Config):
    """The demo."""

    out: str = "out/demo"
    """Folder for the demo's indexes and captions."""
    show: int = Field(6, ge=0)
    """Number of images to show."""
    address: str | None = None
    """Address of a Ray cluster; by default a local one is started."""


class SearchOptions(Config):
    """One search in an index."""

    index: str
    """Published index."""
    image: str | None = None
    """Image to search with."""
    text: str | None = None
    """Text to search with."""
    k: Annotated[int, Flag(("-k", "--k"))] = Field(10, ge=1)
    """Number of captions to find."""
    encoder: str | None = None
    """Retrieval encoder: `open_clip:MODEL/PRETRAINED` or `hf:ID-OR-PATH`; by default the index's encoder."""
    as_json: AsJson = False
    """Print JSON."""


class InspectOptions(Config):
    """A look at an index or a run."""

    path: Annotated[str, POSITIONAL]
    """An index or a captioning run."""
    samples: int = Field(5, ge=0)
    """Number of rows to show."""
    as_json: AsJson = False
    """Print JSON."""


class DoctorOptions(Config):
    """An examination of this machine, and of what a run on it is to use."""

    model: str = "demo"
    """Model to load: `demo`, a checkpoint folder, or a Hugging Face id."""
    index: str | None = None
    """Published index to look at."""
    retrieval_encoder: str | None = None
    """Retrieval encoder for the index; by default the one that it names."""
    storage: tuple[str, ...] = ()
    """Folder or prefix in which a small file is written, read, replaced on a condition, and deleted."""
    address: str | None = None
    """Address of a Ray cluster, whose nodes are asked what they have installed; by default a local Ray is tried."""
    device: Device = "auto"
    """Device to prove. `auto` takes a GPU if there is one, else the CPU."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Folder for copies of remote indexes."""
    quick: bool = False
    """Start no local Ray, and leave out what searches, captions and measures: a few seconds instead of minutes."""
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
