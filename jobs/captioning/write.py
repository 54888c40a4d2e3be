"""The last stage: writes rows as parts, sorted by id, atomically, under names that a repeated task overwrites."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasink
from ray.data.block import BlockAccessor

from jobs.captioning.layout import CaptionLayout
from jobs.captioning.monitor import MonitorClient
from jobs.captioning.record import Attempt, check_attempt
from jobs.captioning.stage_report import StageReport
from smallcap.images.fragments import qualified_id
from smallcap.images.row_ranges import RowRanges
from smallcap.output.coverage import count_rows
from smallcap.output.part_files import PartInfo, write_part
from smallcap.output.schema import ENDS_FRAGMENT, FRAGMENT, FRAGMENT_ROW, STATUS_ERROR


class PartSink(Datasink[None]):
    """Writes each task's rows as one part.

    Args:
        out: The run's folder.
        attempt: The attempt that writes.
        number: The attempt's number, from 1.
        schema: The schema of the parts.
        layout: How parts are written, and what is written with them.
        monitor: What is told of written rows.
    """

    def __init__(
        self,
        out: str,
        attempt: Attempt,
        number: int,
        schema: pa.Schema,
        layout: CaptionLayout,
        monitor: MonitorClient,
    ) -> None:
        self._out, self._attempt, self._number, self._schema = out, attempt, number, schema
        self._layout, self._monitor = layout, monitor

    def write(self, blocks: Iterable[Any], ctx: Any) -> None:
        """Writes one task's blocks."""
        started = time.perf_counter()
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        filled = [table for table in tables if table.num_rows]
        if not filled:
            return
        table = pa.concat_tables(filled)
        info = describe_part(table)
        table = _with_unique_ids(table)
        check_attempt(self._out, self._attempt)
        name = f"part-{self._number:03d}-{ctx.task_idx:06d}.parquet"
        write_part(self._out, name, table, info, self._schema, self._layout.parts)
        seconds = time.perf_counter() - started
        self._monitor.report(StageReport(stage="write", images=table.num_rows, seconds=seconds, errors=info.errors))

    @property
    def min_rows_per_write(self) -> int:
        """How many rows Ray gathers for one part."""
        return self._layout.rows_per_part


def describe_part(table: pa.Table) -> PartInfo:
    """Returns which rows of which fragments a part holds, and how they fared.

    Args:
        table: Its rows, with the columns that place them in the run's input.
    """
    fragments, rows = table[FRAGMENT].to_numpy(), table[FRAGMENT_ROW].to_numpy()
    failed = pc.equal(table["status"], STATUS_ERROR).to_numpy()
    ends = fragments[table[ENDS_FRAGMENT].to_numpy()]
    return PartInfo(
        rows={int(number): RowRanges.of(rows[fragments == number]) for number in np.unique(fragments)},
        failed={
            int(number): RowRanges.of(rows[failed & (fragments == number)]) for number in np.unique(fragments[failed])
        },
        ends=tuple(sorted(set(ends.tolist()))),
        **count_rows(table),
    )


def _with_unique_ids(table: pa.Table) -> pa.Table:
    """Gives `qualified_id` to the images of tars and Parquet files whose ids others of the part have."""
    if pc.count_distinct(table["image_id"]).as_py() == len(table):
        return table
    order = pc.sort_indices(table, sort_keys=[("image_id", "ascending"), ("image_uri", "ascending")]).to_numpy()
    ids, uris = table["image_id"].to_pylist(), table["image_uri"].to_pylist()
    for before, row in pairwise(order[::-1].tolist()):
        if ids[row] == ids[before]:  # from the last to the first, which keeps its id
            ids[before] = qualified_id(ids[before], uris[before])
    return table.set_column(table.column_names.index("image_id"), "image_id", pa.array(ids, pa.string()))
