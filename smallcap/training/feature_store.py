"""Stored features, which training reads instead of images, and the captions that were retrieved for each image.

A folder of features holds Parquet parts of at most 256 images for each split, and `features.json`, which says what they
were computed from and, once all are there, lists them. A folder of candidates holds a part with the same name and
rows for each. Parts are written whole, and a manifest last. The formats are described in docs/formats.md.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from smallcap import storage
from smallcap.errors import ConfigError, SchemaError
from smallcap.options import config_difference
from smallcap.output.schema import STATUS_OK
from smallcap.records import Record, VersionedRecord, load_record

FORMAT_VERSION: Final = 1
FEATURES_FILE, CANDIDATES_FILE = "features.json", "candidates.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

_LAST = "-last"
_SHAPE_KEY = b"smallcap.features"
_CANDIDATE = pa.struct([("caption_id", pa.int64()), ("text", pa.string()), ("score", pa.float32())])
_CANDIDATES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("candidates", pa.list_(_CANDIDATE), nullable=False),
    ]
)


class PartEntry(Record):
    """One part of stored features."""

    split: Split
    name: str
    images: int  # with features
    examples: int  # captions of these images
    errors: dict[str, int] = Field(default_factory=dict)  # images without features, by code


class StoreManifest(VersionedRecord):
    """The content of `features.json` and `candidates.json`."""

    format_version: Literal[1] = FORMAT_VERSION
    identity: dict[str, Any]  # what the parts were computed from
    complete: bool = False
    parts: tuple[PartEntry, ...] = ()  # once complete

    def parts_of(self, split: Split) -> list[PartEntry]:
        """Returns a split's parts."""
        return [part for part in self.parts if part.split == split]


@dataclass(frozen=True)
class FeatureRows:
    """The images of one part that have features.

    Attributes:
        image_ids: The id of each image.
        captions: The captions of each image, in order.
        features: [n, P, Hv] float16, the vision encoder's hidden states.
    """

    image_ids: list[str]
    captions: list[list[str]]
    features: np.ndarray


@dataclass(frozen=True)
class QueryRows:
    """The same images as queries to an index.

    Attributes:
        image_ids: The id of each image.
        captions: The captions of each image, in order.
        embeddings: [n, dim] float32, the retrieval encoder's unit vectors; None if there was no such encoder.
    """

    image_ids: list[str]
    captions: list[list[str]]
    embeddings: np.ndarray | None


def open_store(uri: str, identity: Mapping[str, Any]) -> StoreManifest:
    """Continues a folder of features or candidates, or starts one.

    Args:
        uri: URI of `features.json` or `candidates.json`.
        identity: What the parts are computed from.

    Raises:
        ConfigError: The folder's parts were computed from something else.
        SchemaError: The manifest is malformed, or has another format version.
    """
    manifest = load_record(StoreManifest, uri, SchemaError)
    if manifest is None:
        manifest = StoreManifest(identity=dict(identity))
        manifest.write(uri)
        return manifest
    if changes := config_difference(manifest.identity, identity):
        raise ConfigError(
            "The stored parts were computed from something else.",
            where=uri,
            found="; ".join(changes),
            remedy="Give another --out, or another folder with --set features=FOLDER.",
        )
    return manifest


def part_name(fragment: int, batch: int, is_last: bool) -> str:
    """Returns the name of the part for a fragment's batch; the name says which batch is the last."""
    return f"part-{fragment:06d}-{batch:05d}{_LAST if is_last else ''}.parquet"


def finished_fragments(folder: str, split: Split) -> set[int]:
    """Returns the fragments whose parts are all stored."""
    batches: dict[int, list[tuple[int, bool]]] = {}
    for name in _part_names(folder, split):
        fragment, batch = name.removesuffix(".parquet").removesuffix(_LAST).split("-")[1:]
        batches.setdefault(int(fragment), []).append((int(batch), name.endswith(f"{_LAST}.parquet")))
    return {
        fragment
        for fragment, stored in batches.items()
        if sorted(batch for batch, _ in stored) == list(range(len(stored))) and max(stored)[1]
    }


def _part_names(folder: str, split: Split) -> list[str]:
    names = (uri.rsplit("/", 1)[-1] for uri in storage.list_folder(storage.join(folder, split)))
    return [name for name in names if name.startswith("part-") and name.endswith(".parquet")]


def list_parts(folder: str) -> tuple[PartEntry, ...]:
    """Describes the parts in a folder of features, in the order of their names."""
    return tuple(_describe(folder, split, name) for split in SPLITS for name in _part_names(folder, split))


def _describe(folder: str, split: Split, name: str) -> PartEntry:
    table = _read(storage.join(folder, split, name), ["captions", "error_code"])
    good = pc.is_null(table["error_code"])
    counted = table.filter(pc.invert(good))["error_code"].value_counts().to_pylist()
    return PartEntry(
        split=split,
        name=name,
        images=pc.sum(good, min_count=0).as_py(),
        examples=pc.sum(pc.list_value_length(table.filter(good)["captions"]), min_count=0).as_py(),
        errors={entry["values"]: entry["counts"] for entry in counted},
    )


def read_failures(folder: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields these columns of the images without features, in a folder that may not be complete yet."""
    manifest = load_record(StoreManifest, storage.join(folder, FEATURES_FILE), SchemaError)
    parts = manifest.parts if manifest and manifest.complete else list_parts(folder)
    for part in parts:
        if part.errors:
            rows = _read(storage.join(folder, part.split, part.name), columns)
            yield from rows.filter(pc.is_valid(rows["error_code"])).to_pylist()


def feature_table(
    rows: pa.Table, captions: Sequence[Sequence[str]], features: np.ndarray, embeddings: np.ndarray | None
) -> pa.Table:
    """Returns the rows of a part.

    Args:
        rows: `image_id`, `image_uri`, `status`, `error_code` and `error_message` of n images.
        captions: The captions of each image.
        features: [m, P, Hv] float16, for the m images with status `ok`, in order.
        embeddings: [m, dim] float32, or None.
    """
    good = pc.equal(rows["status"], STATUS_OK).to_numpy()
    _, patches, hidden_size = features.shape
    fields = ["image_id", "image_uri", "status", "error_code", "error_message"]
    table = rows.select(fields).append_column("captions", pa.array(captions, pa.list_(pa.string())))
    blobs = iter(features.astype("<f2", copy=False))
    kind = pa.binary(patches * hidden_size * 2)
    table = table.append_column("features", pa.array([next(blobs).tobytes() if ok else None for ok in good], kind))
    if embeddings is not None:
        vectors = iter(embeddings)
        kind = pa.list_(pa.float32(), embeddings.shape[1])
        table = table.append_column("embedding", pa.array([next(vectors) if ok else None for ok in good], kind))
    shape = {"format_version": FORMAT_VERSION, "patches": patches, "hidden_size": hidden_size}
    return table.replace_schema_metadata({_SHAPE_KEY: json.dumps(shape)})


def write_part(uri: str, table: pa.Table) -> None:
    """Writes a part of features or candidates, whole."""
    buffer = io.BytesIO()
    # Features are noise to a compressor, and each is read whole: neither dictionary nor statistics would help.
    compression = {name: "none" if name == "features" else "zstd" for name in table.column_names}
    pq.write_table(table, buffer, compression=compression, use_dictionary=False, write_statistics=False)
    storage.write_bytes(uri, buffer.getvalue())


def read_features(uri: str) -> FeatureRows:
    """Reads the images of a part that have features.

    Raises:
        SchemaError: The file is not such a part.
    """
    table = _read(uri)
    shape = json.loads((table.schema.metadata or {}).get(_SHAPE_KEY, b"{}"))
    if shape.get("format_version") != FORMAT_VERSION:
        raise SchemaError("This is not a part of stored features.", where=uri, expected=f"format {FORMAT_VERSION}")
    table = table.filter(pc.equal(table["status"], STATUS_OK)).combine_chunks()
    blobs = table["features"].combine_chunks()
    start = blobs.offset * blobs.type.byte_width
    data = np.frombuffer(blobs.buffers()[1], np.uint8)[start : start + len(table) * blobs.type.byte_width]
    return FeatureRows(
        image_ids=table["image_id"].to_pylist(),
        captions=table["captions"].to_pylist(),
        features=data.view("<f2").reshape(len(table), shape["patches"], shape["hidden_size"]),
    )


def read_queries(uri: str) -> QueryRows:
    """Reads the images of a part that have features, without the features.

    Raises:
        SchemaError: The file is not such a part.
    """
    table = _read(uri, ["image_id", "captions", "status", "embedding"])
    table = table.filter(pc.equal(table["status"], STATUS_OK)).combine_chunks()
    embeddings = None
    if "embedding" in table.column_names:
        vectors = table["embedding"].combine_chunks()
        embeddings = vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size)
    return QueryRows(table["image_id"].to_pylist(), table["captions"].to_pylist(), embeddings)


def candidate_table(image_ids: Sequence[str], candidates: Sequence[Sequence[Mapping[str, Any]]]) -> pa.Table:
    """Returns a part's candidates: `caption_id`, `text` and `score` of each, nearest first, for each image."""
    return pa.table([pa.array(image_ids, pa.string()), pa.array(candidates, _CANDIDATES[1].type)], schema=_CANDIDATES)


def read_candidates(uri: str) -> list[list[str]]:
    """Reads the texts of a part's candidates, nearest first, for each image that has features.

    Raises:
        SchemaError: The file is not such a part.
    """
    lists = _read(uri, ["candidates"])["candidates"].combine_chunks()
    texts = pc.struct_field(lists.flatten(), "text").to_pylist()
    ends = np.cumsum(pc.list_value_length(lists).to_numpy()).tolist()
    return [texts[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _read(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a part, or those of `columns` that it has."""
    try:
        with storage.open_ranged(uri) as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)
            known = parquet.schema_arrow.names if columns is None else columns
            return parquet.read([name for name in known if name in parquet.schema_arrow.names])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise SchemaError(
            "A part of stored features cannot be read.",
            where=uri,
            found=str(error),
            remedy="Delete it and the manifest next to its folder, and start the run again.",
        ) from error
