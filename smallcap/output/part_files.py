"""Writes and reads the output files of a captioning run: parts, their footers, and their sidecars.

The footer of a part says which rows of which fragments of the work list it holds, so that a run which goes on reads
footers instead of ids. Sidecars (`_embeddings/`, `_webdataset/`) have the name of their part and are written before it:
a sidecar without a part does not count. This module knows nothing of how fragments are read.

What has been captioned before a part is full is written in interim parts, `part-AAA-TTTTTT-NNNN.parquet`. They do not
count any more once `part-AAA-TTTTTT.parquet` exists, which holds all their rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.images.fragments import LeftOut
from smallcap.images.row_ranges import RowRanges
from smallcap.output.parquet_files import damaged_part, read_parquet, write_parquet
from smallcap.output.schema import (
    EMBEDDING_COLUMN,
    IMAGE_BYTES_COLUMN,
    PLACE_COLUMNS,
    STATUS_OK,
    check_caption_schema,
    kept_columns,
)
from smallcap.output.webdataset import Sample, rewrite_samples, write_samples

# What begins with _ is hidden from readers that take the whole output as a data set.
RUN_FILE = "_run.json"  # the record, which the job writes
EMBEDDINGS_FOLDER = "_embeddings"
WEBDATASET_FOLDER = "_webdataset"
SIDECAR_FOLDERS = (EMBEDDINGS_FOLDER, WEBDATASET_FOLDER)

_INTERIM = re.compile(r"(part-\d+-\d+)-\d+\.parquet")
_INFO_KEY = b"smallcap.part"
_MAGIC = b"PAR1"
_FOOTER_READ_BYTES = 64 << 10  # most footers are smaller, and a store answers as quickly as for a byte
_FOOTER_THREADS = 32
_ROWS_AS_OBJECTS = 256  # rows of a tar that are held together; images are taken one by one


@dataclass(frozen=True)
class PartInfo:
    """The rows of a part, as its footer gives them."""

    rows: dict[int, RowRanges] = field(default_factory=dict)  # rows held, errors included, by fragment
    failed: dict[int, RowRanges] = field(default_factory=dict)  # rows among them with status `error`
    ends: tuple[int, ...] = ()  # fragments whose last row is held
    ok: int = 0  # rows with a caption
    errors: dict[str, int] = field(default_factory=dict)  # rows without one, by error code
    left_out: dict[int, LeftOut] = field(default_factory=dict)  # of fragments in `ends` that hold more than their rows

    def to_json(self) -> str:
        """Returns the text for the footer's metadata."""
        values = {
            "rows": {str(fragment): ranges.to_json() for fragment, ranges in sorted(self.rows.items())},
            "failed": {str(fragment): ranges.to_json() for fragment, ranges in sorted(self.failed.items())},
            "ends": sorted(self.ends),
            "ok": self.ok,
            "errors": dict(sorted(self.errors.items())),
            "left_out": {str(fragment): left_out for fragment, left_out in sorted(self.left_out.items())},
        }
        return json.dumps(values, separators=(",", ":"))

    @property
    def captioned(self) -> dict[int, RowRanges]:
        """The rows with a caption, by fragment."""
        return _subtract(self.rows, self.failed)

    def without(self, rows: Mapping[int, RowRanges], ok: int, errors: dict[str, int]) -> PartInfo:
        """Returns what the footer says of the part without some rows, by fragment.

        Args:
            rows: The rows that are taken out.
            ok: The captions that are left.
            errors: The rows without one that are left, by error code.
        """
        left = _subtract(self.rows, rows)
        ends = tuple(number for number in self.ends if number in left and left[number].stop == self.rows[number].stop)
        left_out = {number: self.left_out[number] for number in ends if number in self.left_out}
        return PartInfo(left, _subtract(self.failed, rows), ends, ok, errors, left_out)

    @classmethod
    def joined(cls, infos: Sequence[PartInfo]) -> PartInfo:
        """Returns what the footer of one part says that has the rows of several; no row is in two of them."""
        rows: dict[int, RowRanges] = {}
        failed: dict[int, RowRanges] = {}
        errors = Counter[str]()
        for info in infos:
            for known, more in ((rows, info.rows), (failed, info.failed)):
                for fragment, ranges in more.items():
                    known[fragment] = known[fragment].union(ranges) if fragment in known else ranges
            errors.update(info.errors)
        ends = sorted({fragment for info in infos for fragment in info.ends})
        left_out = {fragment: counts for info in infos for fragment, counts in info.left_out.items()}
        return cls(rows, failed, tuple(ends), sum(info.ok for info in infos), dict(sorted(errors.items())), left_out)

    @classmethod
    def from_json(cls, text: str | bytes) -> PartInfo:
        """Reads the text of `to_json`.

        Raises:
            SchemaError: The text is malformed.
        """
        try:
            values = json.loads(text)
            return cls(
                {int(fragment): RowRanges.from_json(ranges) for fragment, ranges in values["rows"].items()},
                {int(fragment): RowRanges.from_json(ranges) for fragment, ranges in values["failed"].items()},
                tuple(int(fragment) for fragment in values["ends"]),
                int(values["ok"]),
                {str(code): int(count) for code, count in values["errors"].items()},
                {int(fragment): LeftOut(*map(int, counts)) for fragment, counts in values.get("left_out", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SchemaError(
                "The footer of a part does not say which rows it holds.", found=repr(text)[:200]
            ) from error


def _subtract(rows: Mapping[int, RowRanges], less: Mapping[int, RowRanges]) -> dict[int, RowRanges]:
    """Returns the rows of each fragment that are not in `less`."""
    left = {number: ranges.subtract(less[number]) if number in less else ranges for number, ranges in rows.items()}
    return {number: ranges for number, ranges in left.items() if ranges}


@dataclass(frozen=True)
class PartOptions:
    """How parts are written, and which sidecars they have."""

    rows_per_row_group: int = 1000
    embeddings: bool = False  # the rows have a column `embedding`, which goes to a file of its own
    webdataset: bool = False  # the rows have a column `image_bytes`, which goes to a tar with the captions


def part_name(attempt: int, number: int, interim: int | None = None) -> str:
    """Returns the name of a part: of an attempt's full part, or of the interim part of that number."""
    end = "" if interim is None else f"-{interim:04d}"
    return f"part-{attempt:03d}-{number:06d}{end}.parquet"


def full_name(name: str) -> str | None:
    """Returns the name of the full part for which an interim part stands; None for a part that is none."""
    interim = _INTERIM.fullmatch(name)
    return f"{interim[1]}.parquet" if interim else None


def list_parts(out: str) -> list[str]:
    """Lists the URIs of the parts that count, oldest attempt first; empty where the folder does not exist."""
    return tell_parts(out)[0]


def tell_parts(out: str) -> tuple[list[str], list[str]]:
    """Returns the URIs of the parts that count, and of the interim parts whose full part exists."""
    uris = [uri for uri in storage.list_folder(out) if _name(uri).startswith("part-") and uri.endswith(".parquet")]
    names = set(map(_name, uris))
    replaced = [uri for uri in uris if full_name(_name(uri)) in names]
    gone = set(replaced)
    return [uri for uri in uris if uri not in gone], replaced


def write_part(
    out: str, name: str, table: pa.Table, info: PartInfo, schema: pa.Schema, options: PartOptions | None = None
) -> None:
    """Writes a part, its sidecars first; a part of the same name is replaced.

    Args:
        out: The output folder.
        name: The part's name, `part-AAA-TTTTTT.parquet`.
        table: Rows in any order, with at least the schema's columns. `options.embeddings` needs `embedding`, lists of
            float32 of one length, and the rows' places; `options.webdataset` needs `image_bytes`. Embeddings and bytes
            may be null for errors.
        info: What the footer says about these rows.
        schema: The part's columns with the run's metadata, from `schema.caption_schema`.
        options: How to write the part.
    """
    options = options or PartOptions()
    order = pc.sort_indices(table["image_id"])
    if options.embeddings:
        embeddings = _embeddings(table, order).replace_schema_metadata(schema.metadata)
        if len(embeddings):
            write_parquet(sidecar_uri(out, EMBEDDINGS_FOLDER, name), embeddings, options.rows_per_row_group)
    if options.webdataset:
        samples = _samples(table, order, kept_columns(schema))
        write_tar(sidecar_uri(out, WEBDATASET_FOLDER, name), lambda path: write_samples(path, samples))
    rows = table.select(schema.names).take(order).cast(schema)
    write_parquet(storage.join(out, name), with_info(rows, info), options.rows_per_row_group)


def read_part_infos(out: str) -> Iterator[tuple[str, PartInfo]]:
    """Reads the footers of all parts, many at once, and no rows.

    Yields:
        Each part's name within `out`, oldest attempt first, and its info.

    Raises:
        SchemaError: A part is not Parquet, has another schema version, or does not say which rows it holds.
    """
    parts = list_parts(out)
    with ThreadPoolExecutor(max_workers=_FOOTER_THREADS) as pool:
        yield from zip(map(_name, parts), pool.map(_read_info, parts), strict=True)


def drop_rows(out: str, name: str, image_ids: pa.Array, info: PartInfo) -> None:
    """Rewrites a part and its sidecars without the rows of some images; removes a file that has no rows left.

    The part comes last, as in `write_part`: after an interruption it still has the rows, and they can be dropped again.

    Args:
        out: The output folder.
        name: The part's name within it.
        image_ids: The ids of the images, strings; ids that the part lacks are ignored.
        info: What the footer says about the rows that are left.

    Raises:
        SchemaError: The part or a sidecar is damaged.
    """
    dropped = set(image_ids.to_pylist())
    strings = image_ids.cast(pa.string())

    def drop(rows: pa.Table) -> pa.Table:
        return rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=strings)))

    if dropped:
        _rewrite_sidecars(out, name, drop, lambda image_id: None if image_id in dropped else image_id)
    _rewrite_parquet(storage.join(out, name), lambda rows: with_info(drop(rows), info))


def rename_rows(out: str, name: str, new_ids: Mapping[str, str]) -> None:
    """Rewrites a part and its sidecars with new ids of some images; the part comes last.

    Args:
        out: The output folder.
        name: The part's name within it.
        new_ids: The new ids by the old ones.

    Raises:
        SchemaError: The part or a sidecar is damaged.
    """

    def rename(rows: pa.Table) -> pa.Table:
        ids = [new_ids.get(image_id, image_id) for image_id in rows["image_id"].to_pylist()]
        place = rows.column_names.index("image_id")
        return rows.set_column(place, rows.schema.field("image_id"), [pa.array(ids, pa.string())]).sort_by("image_id")

    _rewrite_sidecars(out, name, rename, lambda image_id: new_ids.get(image_id, image_id))
    _rewrite_parquet(storage.join(out, name), rename)


def _rewrite_sidecars(
    out: str, name: str, change: Callable[[pa.Table], pa.Table], new_id: Callable[[str], str | None]
) -> None:
    embeddings, tar = sidecar_uri(out, EMBEDDINGS_FOLDER, name), sidecar_uri(out, WEBDATASET_FOLDER, name)
    if storage.exists(embeddings):
        _rewrite_parquet(embeddings, change)
    if storage.exists(tar):
        with storage.local_file(tar) as source:
            write_tar(tar, lambda path: rewrite_samples(source, path, new_id))


def remove_orphans(out: str) -> list[str]:
    """Deletes the sidecars that an interrupted writer left without a part, and returns their URIs.

    Call it only while no other process writes parts: their sidecars are orphans for a moment.
    """
    wanted = {sidecar_uri(out, folder, _name(part)) for part in list_parts(out) for folder in SIDECAR_FOLDERS}
    sidecars = [uri for folder in SIDECAR_FOLDERS for uri in storage.list_folder(storage.join(out, folder))]
    orphans = [uri for uri in sidecars if uri not in wanted and _name(uri).startswith("part-")]
    for uri in orphans:
        storage.remove(uri)
    return orphans


def _name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]


def sidecar_uri(out: str, folder: str, name: str) -> str:
    """Returns the URI of a part's sidecar in one of the `SIDECAR_FOLDERS`."""
    return storage.join(out, folder, name if folder == EMBEDDINGS_FOLDER else f"{name.removesuffix('.parquet')}.tar")


def with_info(rows: pa.Table, info: PartInfo) -> pa.Table:
    """Returns rows with a footer that says which they are."""
    return rows.replace_schema_metadata({**rows.schema.metadata, _INFO_KEY: info.to_json().encode()})


def _embeddings(table: pa.Table, order: pa.Array) -> pa.Table:
    """Returns id, embedding and place of the rows that have an embedding, in this order."""
    column = table[EMBEDDING_COLUMN].combine_chunks()
    order = order.filter(column.is_valid().take(order))
    lists = column.take(order)
    values = pc.cast(pc.list_flatten(lists), pa.float32())
    dim = len(values) // len(lists) if len(lists) else 0
    vectors = pa.FixedSizeListArray.from_arrays(values, dim) if dim else pa.nulls(0, pa.list_(pa.float32(), 1))
    fields = [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field(EMBEDDING_COLUMN, vectors.type),
        *(pa.field(name, pa.int32(), nullable=False) for name in PLACE_COLUMNS.values()),
    ]
    places = [table[name].take(order) for name in PLACE_COLUMNS]
    return pa.Table.from_arrays([table["image_id"].take(order), vectors, *places], schema=pa.schema(fields))


def _samples(table: pa.Table, order: pa.Array, kept: list[str]) -> Iterator[Sample]:
    """Yields the captioned images in this order, a few rows at a time."""
    order = order.filter(pc.equal(table["status"], STATUS_OK).take(order).combine_chunks())
    images = table[IMAGE_BYTES_COLUMN]
    columns = ["image_id", "image_uri", "width", "height", "caption", "caption_logprob", "neighbours", *kept]
    rows = table.select(columns)
    for start in range(0, len(order), _ROWS_AS_OBJECTS):
        positions = order.slice(start, _ROWS_AS_OBJECTS)
        for position, row in zip(positions.to_pylist(), rows.take(positions).to_pylist(), strict=True):
            record = {"logprob" if name == "caption_logprob" else name: value for name, value in row.items()}
            yield Sample(record.pop("image_id"), images[position].as_py(), record.pop("caption"), record)


def write_tar(uri: str, write: Callable[[Path], int]) -> None:
    """Writes a tar and moves it to its URI; a tar without samples is removed from there."""
    with storage.scratch_folder() as folder:
        path = folder / _name(uri)
        if write(path):
            storage.move_in(path, uri)
        else:
            storage.remove(uri)


def _rewrite_parquet(uri: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replaces a file by one with changed rows; removes it where no row is left."""
    table, rows_per_row_group = read_parquet(uri)
    left = change(table)
    if not len(left):
        storage.remove(uri)
    else:
        write_parquet(uri, left, rows_per_row_group)


def _read_info(uri: str) -> PartInfo:
    try:
        metadata = pq.read_metadata(pa.BufferReader(_read_footer(uri)))
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged_part(uri, error) from error
    check_caption_schema(schema, uri)
    try:
        return PartInfo.from_json(schema.metadata.get(_INFO_KEY, b""))
    except SchemaError as error:
        raise damaged_part(uri, error) from error


def _read_footer(uri: str) -> bytes:
    """Returns the end of a Parquet file with its whole footer, and perhaps more."""
    tail = storage.read_tail(uri, _FOOTER_READ_BYTES)
    needed = int.from_bytes(tail[-8:-4], "little") + 8  # the footer's length and the magic word end the file
    if tail.endswith(_MAGIC) and needed > len(tail):
        tail = storage.read_tail(uri, needed)
    return tail
