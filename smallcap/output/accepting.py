"""Chooses the rows of a run whose scores are good enough, and writes them as one Parquet file.

The file appears whole or not at all, and the same run and bounds give the same bytes. It streams: memory does not grow
with the run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.errors import ConfigError
from smallcap.output.reading import Captions
from smallcap.output.schema import STATUS_OK

ERROR, EMPTY = "error", "empty"  # reasons besides the columns
_ROWS_PER_ROW_GROUP = 10_000
_FILTER_KEY = "smallcap.filter"


@dataclass(frozen=True)
class Bounds:
    """What a row's scores must be, by column."""

    least: Mapping[str, float]
    most: Mapping[str, float]


def reasons_of(rows: pa.RecordBatch, bounds: Bounds) -> pa.Array:
    """Returns the first reason against each row, as strings; null accepts it.

    A row without a score does not reach a lower bound, and does not exceed an upper one.

    Args:
        rows: Rows with `status`, `caption` and the columns of the bounds.
        bounds: What the scores must be.
    """
    has_text = pc.not_equal(pc.utf8_trim_whitespace(rows["caption"].fill_null("")), "")
    tests = [(ERROR, pc.equal(rows["status"], STATUS_OK)), (EMPTY, has_text)]
    tests += [
        (name, pc.fill_null(pc.greater_equal(_float64(rows[name]), least), False))
        for name, least in bounds.least.items()
    ]
    tests += [
        (name, pc.fill_null(pc.less_equal(_float64(rows[name]), most), True)) for name, most in bounds.most.items()
    ]
    failed = np.stack([~test.to_numpy(zero_copy_only=False) for _, test in tests])
    first = np.where(failed.any(axis=0), failed.argmax(axis=0), -1)
    names = pa.array([name for name, _ in tests])
    return names.take(pa.array(first, mask=first < 0))


def _float64(column: pa.Array) -> pa.Array:
    """Returns a column's numbers as people write them: 0.3 as float32 is a little more than 0.3."""
    return pa.array(np.round(column.to_numpy(zero_copy_only=False).astype(np.float64), 6), from_pandas=True)


def write_accepted(captions: Captions, bounds: Bounds, file: str, ids: Mapping[str, str]) -> dict[str, int]:
    """Writes the accepted rows to a file, which replaces one that is there.

    The file's metadata say what made it: the ids, and, as JSON in `smallcap.filter`, the bounds and the counts.

    Args:
        captions: All rows of a run, with the columns to write and those that are asked for.
        bounds: What the scores must be.
        file: The file's URI.
        ids: What the metadata say of the run, by name.

    Returns:
        The number of `accepted` rows, and of rejected ones by their first reason.

    Raises:
        ConfigError: The file would be one of the run's own.
        SchemaError: A part of the run is damaged.
        StorageError: The service fails.
    """
    _check_place(captions, file)
    counts = Counter(dict.fromkeys(("accepted", ERROR, EMPTY, *bounds.least, *bounds.most), 0))

    def accepted() -> Iterator[pa.RecordBatch]:
        for batch in captions:
            reasons = reasons_of(batch, bounds)
            counts.update(reasons.drop_null().to_pylist())
            counts["accepted"] += reasons.null_count
            yield batch.filter(reasons.is_null())

    def facts() -> dict[str, str]:
        values = {"least": dict(bounds.least), "most": dict(bounds.most), "rows": dict(counts)}
        return {**ids, _FILTER_KEY: json.dumps(values, sort_keys=True)}

    with storage.scratch_folder() as folder:
        _write(folder / "accepted.parquet", captions.schema, accepted(), facts)
        storage.move_in(folder / "accepted.parquet", file)
    return dict(counts)


def _write(
    path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], facts: Callable[[], Mapping[str, str]]
) -> None:
    """Writes batches in row groups of one size, and as metadata the facts, which are asked for at the end."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        held = schema.empty_table()
        for batch in batches:
            held = pa.concat_tables([held, pa.Table.from_batches([batch], schema)])
            while len(held) >= _ROWS_PER_ROW_GROUP:
                writer.write_table(held.slice(0, _ROWS_PER_ROW_GROUP))
                held = held.slice(_ROWS_PER_ROW_GROUP)
        if len(held):
            writer.write_table(held)
        writer.add_key_value_metadata(facts())


def _check_place(captions: Captions, file: str) -> None:
    folder, name = storage.absolute(file).rpartition("/")[::2]
    if folder == storage.absolute(captions.run) and not name.startswith(("_", ".")):
        raise ConfigError(
            "Readers of the run would take this file for one of its parts.",
            where=file,
            expected="a file outside the run's folder",
            remedy=f"Write it elsewhere, or as {storage.join(folder, '_' + name)}.",
        )
