"""The options of retrieval, and what several indexes of one run are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.options import URI, Config, Flag
from smallcap.storage import DEFAULT_CACHE_DIR

SearchDevice = Literal["auto", "cpu", "cuda"]


def as_uris(value: Any) -> Any:
    """Returns the URIs of indexes as options or records have them: one as a text, several as a list, or None."""
    return (value,) if isinstance(value, str) else () if value is None else value


def _as_written(uris: tuple[str, ...]) -> str | list[str] | None:
    """Returns one index as a text, as it stood in a config before there could be several."""
    return list(uris) if len(uris) > 1 else uris[0] if uris else None


IndexURIs = Annotated[tuple[str, ...], URI, BeforeValidator(as_uris), PlainSerializer(_as_written)]
IndexNames = Annotated[tuple[str, ...], Flag(has_commas=True)]
IndexWeights = Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Flag(has_commas=True)]


@dataclass(frozen=True)
class NamedIndex:
    """One of the indexes of a run.

    Attributes:
        name: What the run calls it, in its rows and in the column that chooses an index.
        uri: Its folder or prefix.
        weight: What its scores are multiplied by where they are compared with those of other indexes.
    """

    name: str
    uri: str
    weight: float = 1.0


def default_name(uri: str) -> str:
    """Returns what an index is called if nobody says it: the last part of its URI."""
    return storage.absolute(uri).rstrip("/").rpartition("/")[2]


def name_indexes(
    uris: Sequence[str], names: Sequence[str] = (), weights: Sequence[float] = ()
) -> tuple[NamedIndex, ...]:
    """Returns the indexes of a run with their names and weights.

    Args:
        uris: The indexes.
        names: A name for each; by default the last part of its URI.
        weights: A weight for each; by default 1.

    Raises:
        ConfigError: There are more or fewer names or weights than indexes, or a name is no name or that of two.
    """
    for option, given in (("index_names", names), ("index_weights", weights)):
        if given and len(given) != len(uris):
            raise ConfigError(
                "Each index needs one name and one weight, in the order of the indexes.",
                where=f"retrieval.{option}",
                expected=f"{len(uris)} of them",
                found=str(len(given)),
                remedy="Give none, or one for each --index.",
            )
    found = list(names) or list(map(default_name, uris))
    for name, count in Counter(found).items():
        if count > 1 or "/" in name:
            raise ConfigError(
                "The name of an index has a slash." if "/" in name else "Two indexes of a run have the same name.",
                where="retrieval.index_names" if names else "index",
                expected="a name of its own for each index, without a slash",
                found=name,
                remedy=f"Give --index-names {','.join(f'name{number}' for number in range(1, len(uris) + 1))}, in the "
                "order of the indexes.",
            )
    return tuple(map(NamedIndex, found, uris, weights or [1.0] * len(uris)))


class RetrievalConfig(Config):
    """Which captions are retrieved for an image, and where they are searched."""

    k: Annotated[int | None, Flag(("-k", "--k"))] = Field(None, ge=0, le=64)
    """Retrieved captions in the prompt; by default the checkpoint's number (the paper: 4). 0 prompts without
    retrieval."""
    encoder: Annotated[str | None, Flag(("--retrieval-encoder",), place="encoder")] = None
    """Retrieval encoder: `open_clip:MODEL/PRETRAINED` or `hf:ID-PATH-OR-URI`; by default the one that the index
    names."""
    index_names: IndexNames = ()
    """Names of several indexes, in the order of `--index`: `a,b`. By default the last parts of their URIs."""
    index_weights: IndexWeights = ()
    """What the scores of several indexes are multiplied by when their captions are compared, in the order of `--index`:
    `1,0.9`. By default 1. The scores in the output stay cosines."""
    index_column: str | None = None
    """Column with the name of the index that is searched for an image; where it is empty, all are. It passes through to
    the output. Images with another name become `unknown_index` rows."""
    exclude_own_captions: bool = False
    """Leave out captions whose source image has the query's image id. For evaluation on the datastore's own images."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Folder on each node for copies of remote indexes and models, and for what was measured on the machine."""
    search_device: SearchDevice = "auto"
    """Where the index is searched. `auto` takes the captioning GPU if the index fits next to the model, else the
    CPU."""
    partitions: int = Field(1, ge=1)
    """Actors that share an index too large for one machine; each holds some of its shards. With 1, every captioner maps
    the whole index. Of several indexes, each is shared by so many, or by as many as it has shards."""

    @model_validator(mode="after")
    def _partitions_search_on_cpus(self) -> Self:
        if self.partitions > 1 and self.search_device == "cuda":
            raise ValueError("partitions are searched on CPUs: leave --search-device at auto, or --partitions at 1")
        return self
