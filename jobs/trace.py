"""Finds the images of a run whose prompts held certain captions: those of a dump, of a text, or of an id.

It reads the run's parts as a stream, and neither an index nor an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.record import RunRecord, load_existing_run
from jobs.terminal.call_options import TraceOptions
from smallcap.captions.normal_form import fold_caption
from smallcap.errors import ConfigError, ManifestError, StorageError
from smallcap.index.manifest import load_manifest
from smallcap.output.export import ExportFormat, export_captions
from smallcap.output.reading import Captions, read_captions
from smallcap.phrasing import describe_count

_COLUMNS = ("image_id", "image_uri", "caption", "neighbours")

Held = Callable[[pa.StructArray], np.ndarray]  # says which retrieved captions are looked for


@dataclass(frozen=True, repr=False)
class TracedCaptions(Captions):
    """The rows of a run whose prompts held certain captions; their `neighbours` are only these.

    Attributes:
        held: Says of retrieved captions, [n], which of them are looked for: [n] bool.
    """

    held: Held

    def __len__(self) -> int:
        return sum(map(len, self))  # which no footer says

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Yields the rows in batches; see `Captions`."""
        for batch in super().__iter__():
            lists = batch["neighbours"]
            captions, rows = lists.flatten(), pc.list_parent_indices(lists).to_numpy()
            wanted = self.held(captions)
            counts = np.bincount(rows[wanted], minlength=len(batch))
            offsets = np.concatenate([[0], counts[counts > 0].cumsum()]).astype(np.int32)
            found = batch.filter(pa.array(counts > 0))
            if len(found):
                held = pa.ListArray.from_arrays(offsets, captions.filter(pa.array(wanted)))
                yield found.set_column(batch.schema.get_field_index("neighbours"), "neighbours", held)


def trace(options: TraceOptions) -> TracedCaptions:
    """Opens the rows of a run whose prompts held what the options name.

    Raises:
        ConfigError: There is no run, or it has no such index or source.
        RunError: The run is damaged, or the storage fails.
    """
    record = load_existing_run(options.run)
    captions = read_captions(options.run, _COLUMNS, status="ok")
    _check_index(options, record)
    sources = {name for source in options.source for name in _source_names(source, record, options.index)}
    texts, caption_ids = set(options.text), set(options.caption_id)
    return traced(captions, sources=sources, texts=texts, caption_ids=caption_ids, index=options.index)


def traced(
    captions: Captions,
    *,
    sources: Set[str] = frozenset(),
    texts: Set[str] = frozenset(),
    caption_ids: Set[int] = frozenset(),
    index: str | None = None,
) -> TracedCaptions:
    """Returns the rows for which any caption of these sources, texts or ids was retrieved.

    Texts are compared as indexes compare them: without regard to case, width and white space.

    Args:
        captions: The rows.
        sources: Names of dumps; with several indexes `NAME/dump`.
        texts: Texts.
        caption_ids: Ids in the index.
        index: Of several indexes the one whose captions are meant; with nothing else, all of them.
    """
    keys = set(map(fold_caption, texts))

    def held(neighbours: pa.StructArray) -> np.ndarray:
        wanted = np.full(len(neighbours), not (sources or texts or caption_ids))
        if caption_ids:
            ids = pc.struct_field(neighbours, "caption_id")
            wanted |= _is_in(ids, pa.array(sorted(caption_ids), pa.int64()))
            if index is not None:
                wanted &= _is_of(index, pc.struct_field(neighbours, "sources"), only_first=True)
        if keys:
            column = pc.struct_field(neighbours, "text")
            known = [text for text in column.unique().to_pylist() if fold_caption(text) in keys]
            wanted |= _is_in(column, pa.array(known, pa.string()))
        if sources:
            lists = pc.struct_field(neighbours, "sources")
            rows = pc.list_parent_indices(lists).to_numpy()
            wanted[rows[_is_in(lists.flatten(), pa.array(sorted(sources), pa.string()))]] = True
        if index is not None:
            wanted &= _is_of(index, pc.struct_field(neighbours, "sources"))
        return wanted

    values = {field.name: getattr(captions, field.name) for field in fields(captions)}
    return TracedCaptions(**values, held=held)


def _is_in(values: pa.Array, wanted: pa.Array) -> np.ndarray:
    return pc.is_in(values, value_set=wanted).to_numpy(zero_copy_only=False)


def _is_of(index: str, sources: pa.ListArray, only_first: bool = False) -> np.ndarray:
    """Says which lists of sources have one of an index, or begin with one: [n] bool."""
    rows = pc.list_parent_indices(sources).to_numpy()
    of_index = pc.starts_with(sources.flatten(), f"{index}/").to_numpy(zero_copy_only=False)
    if only_first:
        of_index &= np.diff(rows, prepend=-1) != 0
    found = np.zeros(len(sources), bool)
    found[rows[of_index]] = True
    return found


def _check_index(options: TraceOptions, record: RunRecord) -> None:
    """Checks that the options name an index where the run has several, and only there.

    Raises:
        ConfigError: They do not.
    """
    names = [index.name for index, _ in record.indexes]
    if options.index is not None and (options.index not in names or len(names) == 1):
        raise ConfigError(
            "The run has no such index." if len(names) > 1 else "The run does not have several indexes.",
            where=f"--index {options.index}",
            expected=", ".join(names),
            remedy="" if len(names) > 1 else "Leave --index out.",
        )
    if options.caption_id and options.index is None and len(names) > 1:
        raise ConfigError(
            "The run has several indexes, and each has a caption of this id.",
            where="--caption-id",
            expected=f"--index with one of {', '.join(names)}",
        )


def _source_names(wanted: str, record: RunRecord, only: str | None) -> set[str]:
    """Returns a source's names in rows; an index also knows its URI. Where the index is gone, it is the name itself.

    Args:
        wanted: The source's name in an index, its name in rows, or its URI.
        record: The run's record.
        only: The name of the only index to look at.

    Raises:
        ConfigError: No index has such a source.
    """
    names: dict[str, set[str]] = {}
    found = set()
    for index, index_id in record.indexes:
        if only not in (None, index.name):
            continue
        before = f"{index.name}/" if len(record.indexes) > 1 else ""
        try:
            manifest = load_manifest(index.uri, index_id)
        except (ManifestError, StorageError):
            found |= {wanted, before + wanted}
            continue
        for source in manifest.sources:
            in_rows = before + (source.name or source.uri)
            for name in (source.name, source.uri, in_rows):
                names.setdefault(name, set()).add(in_rows)
    found |= names.get(wanted, set())
    if not found:
        raise ConfigError(
            "The index of this run has no such source.",
            where=f"--source {wanted}",
            expected=", ".join(dict.fromkeys(name for in_rows in names.values() for name in sorted(in_rows))),
            found=wanted,
        )
    return found


def write(found: TracedCaptions, options: TraceOptions) -> str:
    """Writes the rows to the file that the options name, and returns in a line how many they are."""
    kind: ExportFormat = "csv" if options.out.removesuffix(".gz").endswith(".csv") else "jsonl"
    count = export_captions(found, options.out, kind)
    return f"{describe_count(count, 'row')}: {options.out}"
