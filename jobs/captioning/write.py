"""The last stage: gathers captioned rows and writes them, in tasks, as parts: sorted by id, whole or not at all.

A part is written when it is full. What has come until then is saved in interim parts every few seconds, so that a kill
costs little; the full part replaces them. A repeated task overwrites its file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.monitor import MonitorClient
from jobs.captioning.record import Attempt, check_attempt
from jobs.captioning.stage_report import StageReport
from jobs.cluster.resources import on_working_nodes
from smallcap.evaluation.shared_words import measure_shared_words
from smallcap.images.fragments import LeftOut, qualified_id
from smallcap.images.row_ranges import RowRanges
from smallcap.output.coverage import count_rows
from smallcap.output.interim_parts import remove_parts
from smallcap.output.part_files import PartInfo, PartOptions, part_name, write_part
from smallcap.output.schema import (
    ENDS_FRAGMENT,
    FRAGMENT,
    FRAGMENT_ROW,
    LEFT_OUT,
    SHARED_WORDS_COLUMNS,
    STATUS_ERROR,
)

if TYPE_CHECKING:
    import ray.data

# Rows wait at most this long and one batch's time more: with what is being captioned, a kill costs less than a minute.
_SAVE_EVERY_S = 20.0
_SAVE_AT_END_S = 60.0
_WRITES_AT_ONCE = 32  # more would hold the captions of the whole cluster in memory where storage is slow
_ATTEMPTS = 10  # of a task whose process or node is lost


@dataclass(frozen=True)
class PartSink:
    """Writes parts; small and picklable.

    Args:
        out: The run's folder.
        attempt: The attempt that writes.
        schema: The schema of the parts.
        options: How parts are written, and what is written with them.
        monitor: What is told of written rows.
    """

    out: str
    attempt: Attempt
    schema: pa.Schema
    options: PartOptions
    monitor: MonitorClient

    def write(self, name: str, blocks: Sequence[pa.Table], replaced: Sequence[str], saved: int) -> int:
        """Writes a part; returns how many of its rows are new.

        Args:
            name: The part's name.
            blocks: Its rows.
            replaced: The interim parts whose rows it has, to be deleted.
            saved: The first so many blocks are in these interim parts.
        """
        started = time.perf_counter()
        blocks = [self.own_rows(block) if len(block) else block for block in blocks]
        filled = [block for block in blocks if len(block)]  # an empty one may have other columns
        if not filled:
            return 0
        table = pa.concat_tables(filled)
        info = describe_part(table)
        check_attempt(self.out, self.attempt)
        write_part(self.out, name, _with_shared_words(_with_unique_ids(table)), info, self.schema, self.options)
        remove_parts(self.out, replaced)
        new = table.slice(sum(map(len, blocks[:saved])))
        counted = self.counted(new)
        errors = count_rows(counted)["errors"]
        seconds = time.perf_counter() - started
        self.monitor.report(StageReport(stage="write", images=len(counted), seconds=seconds, errors=errors))
        return len(new)

    def own_rows(self, block: pa.Table) -> pa.Table:
        """Returns what of a captioned block belongs to this sink: all of it."""
        return block

    def counted(self, rows: pa.Table) -> pa.Table:
        """Returns those of this sink's rows that no other sink of the pipeline counts: all of them."""
        return rows


class PartWriter:
    """Takes the blocks of a pipeline on the driver, which holds references only, and has them written in tasks.

    The tasks ask for no CPU: they would wait until loading, which always has more to do, has loaded everything, and a
    kill would cost all captions. They run on nodes that have CPUs, as loading does.

    Args:
        attempt: The attempt's number, from 1.
        rows_per_part: Rows of a full part.

    Attributes:
        rows: The rows that are written.
    """

    def __init__(self, attempt: int, rows_per_part: int) -> None:
        self._attempt, self._rows_per_part = attempt, rows_per_part
        self._part = 0  # the number of the part that is being filled
        self._begin_part()
        self._running: list[Any] = []  # what the tasks that write will return
        self._wrote_at: float | None = None
        self._cannot_write = False
        self.rows = 0

    def _begin_part(self) -> None:
        self._blocks: list[Any] = []
        self._rows, self._saved = 0, 0  # rows of the part so far, and how many blocks are in interim parts
        self._interim: list[str] = []

    def write_all(self, captioned: ray.data.Dataset, sink: PartSink) -> None:
        """Runs a pipeline to its end, and writes what it yields; and where something stops it, what it has yielded.

        Raises:
            KeyboardInterrupt: A signal came.
        """
        write_each(captioned, [(self, sink)])

    def begin(self, sink: PartSink) -> None:
        """Says where blocks go."""
        self._sink = sink

    def finish(self) -> None:
        """Has the last part written, and waits for all of them."""
        if self._rows:
            self._write_full()
        self._wait(0)

    def keep(self) -> None:
        """Has written what there is, and waits for it."""
        self._save()
        self._wait(0)

    def add(self, blocks: Sequence[Any], rows: int) -> None:
        """Takes references to blocks with so many rows, and has parts written that are full."""
        now = time.monotonic()
        self._wrote_at = self._wrote_at or now
        if rows:
            self._blocks += blocks
            self._rows += rows
        if self._rows >= self._rows_per_part:
            self._write_full()
        elif now - self._wrote_at >= _SAVE_EVERY_S:
            self._save()
        self._wait(_WRITES_AT_ONCE)

    def _write_full(self) -> None:
        if self._interim:
            self._wait(0)  # else one of them might appear after they are deleted
        self._start(part_name(self._attempt, self._part), self._blocks, self._interim, self._saved)
        self._part += 1
        self._begin_part()

    def _save(self) -> None:
        """Writes the blocks that are in no interim part yet as one."""
        unsaved = self._blocks[self._saved :]
        if unsaved:
            self._interim.append(part_name(self._attempt, self._part, len(self._interim)))
            self._start(self._interim[-1], unsaved, (), 0)
            self._saved = len(self._blocks)

    def keep_soon(self) -> None:
        """Saves what was captioned before a failure, unless it is writing that fails; waits a minute at most."""
        import ray

        if self._cannot_write:
            return
        self._save()
        deadline = time.monotonic() + _SAVE_AT_END_S
        with suppress(Exception):  # the first error says more
            while self._running and (left := deadline - time.monotonic()) > 0:
                done, self._running = ray.wait(self._running, timeout=left)
                self.rows += sum(ray.get(done))

    def _start(self, name: str, blocks: Sequence[Any], replaced: Sequence[str], saved: int) -> None:
        import ray

        task = ray.remote(_write).options(name="Write", num_cpus=0, max_retries=_ATTEMPTS, **on_working_nodes())
        self._running.append(task.remote(self._sink, name, tuple(replaced), saved, *blocks))
        self._wrote_at = time.monotonic()

    def _wait(self, most: int) -> None:
        """Counts what is written, and raises what went wrong, until at most so many tasks are left."""
        import ray

        while self._running:
            more = len(self._running) > most
            done, self._running = ray.wait(self._running, timeout=None if more else 0)
            try:
                self.rows += sum(ray.get(done))
            except Exception:
                self._cannot_write = True
                raise
            if not done:
                return


def write_each(captioned: ray.data.Dataset, writers: Sequence[tuple[PartWriter, PartSink]]) -> None:
    """Runs a pipeline to its end, and gives all that it yields to each writer; see `PartWriter.write_all`.

    Raises:
        KeyboardInterrupt: A signal came.
    """
    for writer, sink in writers:
        writer.begin(sink)
    try:
        for bundle in captioned.iter_internal_ref_bundles():
            for writer, _ in writers:
                writer.add(bundle.block_refs, bundle.num_rows())
        for writer, _ in writers:
            writer.finish()
    except KeyboardInterrupt:
        for writer, _ in writers:
            writer.keep()
        raise
    except Exception:
        for writer, _ in writers:
            writer.keep_soon()
        raise


def _write(sink: PartSink, name: str, replaced: Sequence[str], saved: int, *blocks: Any) -> int:
    from ray.data.block import BlockAccessor

    return sink.write(name, [BlockAccessor.for_block(block).to_arrow() for block in blocks], replaced, saved)


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
        left_out={
            row[FRAGMENT]: LeftOut(*row[LEFT_OUT])
            for row in table.select([FRAGMENT, LEFT_OUT]).filter(pc.is_valid(table[LEFT_OUT])).to_pylist()
        },
        **count_rows(table),
    )


def _with_shared_words(table: pa.Table) -> pa.Table:
    shared = measure_shared_words(table["caption"], table["neighbours"])
    for name in SHARED_WORDS_COLUMNS:
        table = table.append_column(name, getattr(shared, name))
    return table


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
