"""Reads the captions of a run: as a data frame, as an Arrow table, or as a stream that does not grow with the run.

Each image is there once, also while the run goes on or after it was killed: of rows that two parts have, the one that
the run's end will keep. This module does not know how captions are made, and imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.images.row_ranges import RowRanges
from smallcap.images.work_list import load_work_list
from smallcap.output.coverage import NamedPart, find_superseded, is_settled
from smallcap.output.parquet_files import damaged_part
from smallcap.output.part_files import RUN_FILE, PartInfo, read_part_infos
from smallcap.output.schema import CAPTION_COLUMNS, STATUS_ERROR, STATUS_OK
from smallcap.output.variant_runs import name_variants
from smallcap.phrasing import describe_count

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["ok", "error"]

_BATCH_ROWS = 10_000


@dataclass(frozen=True, repr=False)
class Captions:
    """The rows of a captioning run, as they were when `read_captions` was called; see there.

    It holds no rows: each pass over it reads them from the storage, one batch at a time.

    Attributes:
        run: The run's folder or prefix.
        schema: The columns.
    """

    run: str
    schema: pa.Schema
    _parts: tuple[NamedPart, ...]
    _superseded: Mapping[str, pa.Array]  # ids of the rows that do not count, by the part's name
    _status: Status | None

    def __len__(self) -> int:
        return sum(self._count(info) for _, info in self._parts)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Yields the rows in batches of at most 10,000, part after part; within a part they are sorted by id.

        Raises:
            SchemaError: A part is damaged.
            StorageError: The service fails, or the run has meanwhile replaced a part.
        """
        for name in self.parts():
            yield from self.of_part(name)

    def parts(self) -> list[str]:
        """Returns the names of the parts that have such rows."""
        return [name for name, info in self._parts if self._count(info)]

    def rows_of_part(self, name: str) -> Mapping[int, RowRanges]:
        """Returns the places of a part's rows in the input, of failed images too: rows by fragment."""
        return dict(self._parts)[name].rows

    def fingerprint(self) -> str:
        """Returns 16 hexadecimal digits: two readings of a run have the same only if they have the same rows."""
        digest = hashlib.sha256(f"{self.schema.to_string()}\n{self._status}".encode())
        for name, info in self._parts:
            digest.update(f"\n{name} {info.to_json()}".encode())
        return digest.hexdigest()[:16]

    def select(self, columns: Sequence[str]) -> Captions:
        """Returns the same rows with fewer columns, in this order."""
        return replace(self, schema=pa.schema([self.schema.field(name) for name in columns]))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows one by one; errors are those of a pass over the batches."""
        for batch in self:
            yield from batch.to_pylist()

    def to_arrow(self) -> pa.Table:
        """Reads all rows into an Arrow table; errors are those of a pass over the rows."""
        return pa.Table.from_batches(self, schema=self.schema)

    def to_pandas(self) -> pd.DataFrame:
        """Reads all rows into a pandas data frame; errors are those of a pass over the rows."""
        return self.to_arrow().to_pandas()

    def __repr__(self) -> str:
        return f"Captions of {self.run}: {describe_count(len(self), 'row')} of {', '.join(self.schema.names)}"

    def _count(self, info: PartInfo) -> int:
        failed = sum(info.errors.values())
        return {STATUS_OK: info.ok, STATUS_ERROR: failed}.get(self._status or "", info.ok + failed)

    def of_part(self, name: str) -> Iterator[pa.RecordBatch]:
        """Yields the rows of one part; batches and errors are those of a pass over all."""
        uri = storage.join(self.run, name)
        dropped = self._superseded.get(name)
        needed = {
            *self.schema.names,
            *(["status"] if self._status else []),
            *(["image_id"] if dropped is not None else []),
        }
        with storage.open_ranged(uri) as file:
            try:
                part = pq.ParquetFile(file, pre_buffer=True)
                for batch in part.iter_batches(_BATCH_ROWS, columns=sorted(needed)):
                    rows = batch.filter(pc.equal(batch["status"], self._status)) if self._status else batch
                    if dropped is not None:
                        rows = rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=dropped)))
                    if len(rows):
                        yield rows.select(self.schema.names)
            except (pa.ArrowException, OSError) as error:
                raise damaged_part(uri, error) from error


def read_captions(
    run: str | os.PathLike[str], columns: str | Sequence[str] | None = None, status: Status | None = None
) -> Captions:
    """Opens the captions of a run that is complete, goes on, or was stopped; only whole parts are read.

        captions = smallcap.read_captions("s3://bucket/captions", ["image_id", "caption"], status="ok")
        frame = captions.to_pandas()
        for batch in captions:  # pyarrow.RecordBatch, for runs that are larger than the memory
            ...

    Args:
        run: The run's folder or prefix, at any URI.
        columns: The columns to read, in this order; by default all. docs/formats.md describes them.
        status: `ok` leaves failed images out, `error` all others.

    Raises:
        ConfigError: There is no run, a column is unknown, or the status is.
        SchemaError: A part is damaged, or has another schema version.
        StorageError: The service fails.
    """
    out = os.fspath(run)
    if status not in (None, *get_args(Status)):
        raise ConfigError("There is no such status.", where="status", expected="ok, error or None", found=repr(status))
    parts = tuple(read_part_infos(out))
    if not parts and not storage.exists(storage.join(out, RUN_FILE)):
        raise ConfigError(
            "There is no run in this folder.",
            where=out,
            expected=f"a folder with {RUN_FILE}",
            remedy=name_variants(out),
        )
    schema = _read_schema(storage.join(out, parts[0][0])) if parts else CAPTION_COLUMNS
    chosen = schema.names if columns is None else [columns] if isinstance(columns, str) else list(columns)
    if unknown := [name for name in chosen if name not in schema.names]:
        raise ConfigError(
            "The run has no such column.",
            where=out,
            expected=", ".join(schema.names),
            found=", ".join(map(str, unknown)),
        )
    parts, superseded = _each_image_once(out, parts)
    return Captions(out, pa.schema([schema.field(name) for name in chosen]), parts, superseded, status)


def _read_schema(uri: str) -> pa.Schema:
    with storage.open_ranged(uri) as file:
        return pq.ParquetFile(file).schema_arrow


def _each_image_once(out: str, parts: tuple[NamedPart, ...]) -> tuple[tuple[NamedPart, ...], dict[str, pa.Array]]:
    """Returns what is true of the parts without the rows that other parts keep, and the ids of those rows by part."""
    work = None if is_settled(parts) else load_work_list(out)
    if work is None:
        return parts, {}
    found = {part.name: part for part in find_superseded(out, parts, work.fragments)}
    left = tuple((name, found[name].left if name in found else info) for name, info in parts)
    return left, {name: part.image_ids for name, part in found.items()}
