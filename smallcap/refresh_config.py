"""The options of refreshes and takedowns, which make runs anew with another index."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from smallcap.config import ComputeConfig, check_removals
from smallcap.options import POSITIONAL, Config
from smallcap.retrieval_config import IndexNames, IndexURIs, IndexWeights
from smallcap.storage import DEFAULT_CACHE_DIR


class RefreshConfig(Config):
    """A run over the images of another run, with another version of its index, or another index of its encoder."""

    run: Annotated[str, POSITIONAL]
    """A complete captioning run. Its model and options are those of the new run, which does not change it."""
    index: IndexURIs = Field(min_length=1)
    """Published index to retrieve from, or several, which take the place of all that the run had."""
    out: str
    """Output folder or prefix of the new run."""
    index_names: IndexNames = ()
    """Names of several indexes, in the order of `--index`: `a,b`. By default an index that the run had keeps its
    name."""
    index_weights: IndexWeights = ()
    """Weights of several indexes, in the order of `--index`: `1,0.9`. By default an index that the run had keeps its
    weight."""
    compute: ComputeConfig = ComputeConfig()


class ForgetConfig(Config):
    """A removal of captions from an index and from the prompts of runs."""

    runs: Annotated[tuple[str, ...], POSITIONAL] = Field(min_length=1)
    """Complete captioning runs that retrieve from the index. They are not changed."""
    index: str
    """The index of these runs, or one of several; its current version is succeeded by one without the captions."""
    remove: tuple[str, ...] = Field(min_length=1)
    """What to remove: `source=NAME`, `image=ID` or `text=CAPTION`. `image=@FILE` and `text=@FILE` name a file with one
    per line."""
    out: str
    """Folder or prefix for the new runs: each run whose prompts held the captions is refreshed to a folder of its name
    there."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Folder on each node for copies of remote indexes."""
    compute: ComputeConfig = ComputeConfig()

    @field_validator("remove")
    @classmethod
    def _names_a_kind(cls, remove: tuple[str, ...]) -> tuple[str, ...]:
        return check_removals(remove)
