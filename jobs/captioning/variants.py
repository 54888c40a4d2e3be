"""The stages of a pass that captions images in several ways, each of them a run in a folder of its own.

A fragment's rows are loaded once if any variant lacks them. A bit for each variant says which rows it lacks: only for
these does it caption, and only these are written to its folder. What a variant adds to a row travels as one column of
structs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.caption import CaptionerSpec, CaptionImages, TableFunction, captioner_options, open_index
from jobs.captioning.load import LoadSpec, load_batch, read_guarded
from jobs.captioning.write import PartSink
from smallcap.config import CaptionConfig
from smallcap.images.row_ranges import RowRanges
from smallcap.output.coverage import WorkItem
from smallcap.output.schema import STATUS_OK

if TYPE_CHECKING:
    from jobs.captioning.caption_table import TableCaptioner
    from smallcap.captioned import CaptionedBatch
    from smallcap.captioner import Captioner
    from smallcap.variant_captioner import VariantCaptioner

LACKED_BY = "smallcap.lacked_by"  # int64: a bit for each variant
_VARIANT = "smallcap.variant."  # before a variant's number: the name of its column
_NONE = RowRanges()


@dataclass(frozen=True)
class VariantItem(WorkItem):
    """The rows of one fragment that some variant lacks; of each variant those that it lacks, None for all."""

    lacking: tuple[RowRanges | None, ...]

    def lacked_by(self, rows: np.ndarray) -> np.ndarray:
        """Returns for each row, [n] integers, a bit for each variant that lacks it: [n] int64."""
        bits = np.zeros(len(rows), np.int64)
        for number, lacking in enumerate(self.lacking):
            lacks = np.ones(len(rows), bool) if lacking is None else lacking.contains(rows)
            bits |= lacks.astype(np.int64) << number
        return bits


def join_items(todo: Sequence[Sequence[WorkItem]]) -> list[VariantItem]:
    """Joins what each variant lacks, fragment by fragment; all have the same fragments."""
    by_number = [{item.fragment.number: item for item in items} for items in todo]
    joined = []
    for number in sorted({number for items in by_number for number in items}):
        items = [one.get(number) for one in by_number]
        lacking = tuple(item.wanted if item else _NONE for item in items)
        some = [rows for rows in lacking if rows is not None]
        wanted = reduce(RowRanges.union, some) if len(some) == len(lacking) else None
        fragment = next(item.fragment for item in items if item)
        joined.append(VariantItem(fragment, wanted, lacking))
    return joined


def load_variant_images(batch: pa.Table, spec: LoadSpec) -> Iterator[pa.Table]:
    """Loads images as `load_images` does, from pickled `VariantItem`s; its tables say who lacks which row."""
    for pickled in batch["item"]:
        item: VariantItem = pickle.loads(pickled.as_py())  # noqa: S301 - this job's driver wrote it
        for images in read_guarded(item, spec):
            loaded = load_batch(item.fragment.number, images, spec)
            yield loaded.append_column(LACKED_BY, pa.array(item.lacked_by(images.rows)))


class CaptionVariants(CaptionImages):
    """Captions batches of decoded images in several ways.

    Args:
        spec: What all variants share; its config is the first one's.
        variants: The config of each. If any retrieves, the first one does.
    """

    def load(self, spec: CaptionerSpec, variants: Sequence[CaptionConfig] = ()) -> None:
        """Loads the models of all variants, and reports that the actor is ready."""
        self._configs = variants
        super().load(spec)

    def load_captioners(self, spec: CaptionerSpec) -> Sequence[Captioner]:
        """Loads the captioner of each variant."""
        from smallcap.variant_captioner import VariantCaptioner

        ways = [(config.model, captioner_options(config, spec)) for config in self._configs]
        self._variants = VariantCaptioner.from_pretrained(ways, open_index(spec))
        return self._variants.captioners

    def join_tables(self, tables: Sequence[TableCaptioner]) -> TableFunction:
        """Returns what captions tables in all ways."""
        return VariantTables(self._variants, tables, self.note_progress)


class VariantTables:
    """Captions tables of loaded images in several ways; several threads may call it.

    Args:
        captioner: Captions the images.
        tables: Makes the rows of each way.
        note_batch: Called when a batch is captioned.
    """

    def __init__(
        self, captioner: VariantCaptioner, tables: Sequence[TableCaptioner], note_batch: Callable[[], None]
    ) -> None:
        self._captioner, self._tables, self._note_batch = captioner, tables, note_batch

    def __call__(self, batch: pa.Table) -> tuple[pa.Table, *tuple[CaptionedBatch, ...]]:
        """Captions a table of `load_variant_images`.

        Returns:
            The columns that all variants share, with one column of each variant's own, and what became of the images
            that each variant lacks and that could be loaded.
        """
        from smallcap.captioned import CaptionedBatch

        good = np.flatnonzero(pc.equal(batch["status"], STATUS_OK).to_numpy())
        lacked_by = batch[LACKED_BY].to_numpy()
        done: list[list[CaptionedBatch]] = [[] for _ in self._tables]
        rows: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in self._tables]
        for bits in np.unique(lacked_by[good]).tolist():
            some = good[lacked_by[good] == bits]
            ways = [way for way in range(len(self._tables)) if bits >> way & 1]
            for captioned in self._captioner.caption_columns(self._tables[0].batches(batch, some), ways):
                for way, of_way in zip(ways, captioned, strict=True):
                    done[way].append(of_way)
                self._note_batch()
            for way in ways:
                rows[way].append(some)
        joined = [CaptionedBatch.join(parts) for parts in done]
        written = [
            table.tabulate(batch, np.concatenate(places), captioned)
            for table, places, captioned in zip(self._tables, rows, joined, strict=True)
        ]
        return _beside_each_other(batch, written), *joined


def _beside_each_other(batch: pa.Table, written: Sequence[pa.Table]) -> pa.Table:
    """Joins the rows that variants make of one table: what is from loading once, and a column of each one's own."""
    shared = [
        name for name in written[0].column_names if name in batch.column_names and name not in ("width", "height")
    ]
    columns = {name: written[0][name] for name in shared}
    for number, rows in enumerate(written):
        own = [field for field in rows.schema if field.name not in columns]
        arrays = [rows[field.name].combine_chunks() for field in own]
        columns[f"{_VARIANT}{number}"] = pa.StructArray.from_arrays(arrays, fields=own)
    return pa.table(columns)


@dataclass(frozen=True)
class VariantSink(PartSink):
    """Writes the parts of one variant.

    Args:
        number: Which of the pass it is.
    """

    number: int = 0

    def own_rows(self, block: pa.Table) -> pa.Table:
        """Returns the rows that this variant lacks, with its own columns."""
        lacks = pc.not_equal(pc.bit_wise_and(block[LACKED_BY], 1 << self.number), 0)
        rows = block.filter(lacks)
        own = rows[f"{_VARIANT}{self.number}"].combine_chunks()
        rows = rows.select([name for name in rows.column_names if not name.startswith(_VARIANT)])
        for field, column in zip(own.type, own.flatten(), strict=True):
            rows = rows.append_column(field, column)
        return rows

    def counted(self, rows: pa.Table) -> pa.Table:
        """Returns the rows that no variant before this one lacks."""
        before = pc.bit_wise_and(rows[LACKED_BY], (1 << self.number) - 1)
        return rows.filter(pc.equal(before, 0))
