"""What the commands take beside a job's config: how one call of a job is made, and what look-ups are told.

None of it is recorded with a run. Nothing heavy is imported, so that help and wrong options are quick.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smallcap.config import POSITIONAL, Config, Device, Dtype, Flag

_Json = Annotated[bool, Flag(("--json",))]


class JobCall(Config):
    """Where the options come from."""

    config: str | None = None
    """YAML file with options, at any URI. Flags win over it."""
    settings: Annotated[tuple[str, ...], Flag(("--set",))] = ()
    """Any option by its key, as `a.b=c`; the value is YAML, and wins over a flag."""


class RayCall(JobCall):
    """Where the options come from, and where the job runs."""

    address: str | None = None
    """Address of a Ray cluster; by default the one that the job was submitted to, or else a new local one."""


class BuildCall(RayCall):
    """What one call of `smallcap build-index` is to do."""

    dry_run: bool = False
    """Count and plan; build nothing."""


class CaptionCall(RayCall):
    """What one call of `smallcap caption` is to do."""

    retry_failed: bool = False
    """Try failed images again. The run's folder alone is enough: its own options hold."""
    relist: bool = False
    """List the input again, and take what is new."""
    dry_run: bool = False
    """List the input, caption a few batches, and say what the run will take; write nothing."""
    gpu_hour_cost: float | None = Field(None, ge=0)
    """With `--dry-run`: $ that a GPU costs in an hour."""


class TrainCall(RayCall):
    """What one call of `smallcap train` is to do."""

    dry_run: bool = False
    """List the input and say what there is to do."""


class EvaluateCall(JobCall):
    """What one call of `smallcap evaluate` is to do."""

    as_json: _Json = False
    """Print the result as JSON on the last line."""


class DemoOptions(Config):
    """Options of `smallcap demo`."""

    out: str = "out/demo"
    """Folder for the demo's indexes and captions."""
    show: int = Field(6, ge=0)
    """Images to show."""
    address: str | None = None
    """Address of a Ray cluster; by default a local one is started."""


class SearchOptions(Config):
    """Options of `smallcap search`."""

    index: str
    """Published index."""
    image: str | None = None
    """Image to search with."""
    text: str | None = None
    """Text to search with."""
    k: Annotated[int, Flag(("-k", "--k"))] = Field(10, ge=1)
    """Captions to find."""
    encoder: str | None = None
    """Retrieval encoder: `open_clip:MODEL/PRETRAINED` or `hf:ID-OR-PATH`; by default the one that the index names."""
    as_json: _Json = False
    """Print JSON."""


class InspectOptions(Config):
    """Options of `smallcap inspect`."""

    path: Annotated[str, POSITIONAL]
    """An index or a captioning run."""
    samples: int = Field(5, ge=0)
    """Rows to show."""
    as_json: _Json = False
    """Print JSON."""


class IndexListOptions(Config):
    """Options of `smallcap index list`."""

    index: Annotated[str, POSITIONAL]
    """Published index."""
    as_json: _Json = False
    """Print JSON."""


class IndexUseOptions(Config):
    """Options of `smallcap index use`."""

    index: Annotated[str, POSITIONAL]
    """Published index."""
    version: Annotated[str, POSITIONAL]
    """Id of a version, the beginning of one, or `previous`."""


class IndexGcOptions(Config):
    """Options of `smallcap index gc`."""

    index: Annotated[str, POSITIONAL]
    """Published index."""
    grace: str = "1d"
    """Keep what was needed or written within this time, such as 90s, 30m, 12h, 7d."""
    keep: int = Field(1, ge=0)
    """Former versions to keep in any case."""
    dry_run: bool = False
    """Only say what would go."""
    as_json: _Json = False
    """Print JSON."""


class BenchOptions(Config):
    """Options of `smallcap bench`."""

    photos: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Image files; by default one is made."""
    images: int = Field(64, ge=1)
    """Images that the whole loop captions."""
    batch_size: int = Field(64, ge=1)
    """Images captioned together."""
    k: Annotated[int, Flag(("-k", "--k"))] = Field(4, ge=1)
    """Retrieved captions in the prompt."""
    num_beams: int = Field(3, ge=1)
    """Beams of the search. 1 decodes greedily."""
    reduce_factor: int = Field(4, ge=1)
    """Reduce factor of the cross-attention: 1, 2, 4, 8 or 16."""
    retrieval_encoder: str = "shared"
    """`shared`, or an architecture of open_clip such as RN50x64."""
    captions: int = Field(100_000, ge=10)
    """Captions in the index."""
    device: Device = "auto"
    """Device of the model. `auto` takes a GPU if there is one, else the CPU."""
    dtype: Dtype = "auto"
    """Precision of weights and activations."""
    compile: bool = False
    """Compile the encoders with torch.compile."""
    repeats: int = Field(3, ge=1)
    """Runs of each stage; the fastest counts."""
    json_file: Annotated[str | None, Flag(("--json",))] = None
    """File for the line of JSON."""
