"""Finds the images of a run whose prompts held certain captions: those of a dump, of a text, or of an id.

It reads the run's parts as a stream, and neither an index nor an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.record import RunRecord, load_existing_run
from jobs.terminal.call_options import TraceOptions
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
        ConfigError: There is no run, or it has no such source.
        RunError: The run is damaged, or the storage fails.
    """
    record = load_existing_run(options.run)
    captions = read_captions(options.run, _COLUMNS, status="ok")
    sources = {_source_name(source, record) for source in options.source}
    return traced(captions, sources=sources, texts=set(options.text), caption_ids=set(options.caption_id))


def traced(
    captions: Captions,
    *,
    sources: set[str] | frozenset[str] = frozenset(),
    texts: set[str] | frozenset[str] = frozenset(),
    caption_ids: set[int] | frozenset[int] = frozenset(),
) -> TracedCaptions:
    """Returns the rows for which any caption of these sources, texts or ids was retrieved.

    Texts are compared as the index compares them: without regard to case, width and white space.
    """
    keys = _keys(texts)

    def held(neighbours: pa.StructArray) -> np.ndarray:
        wanted = np.zeros(len(neighbours), bool)
        if caption_ids:
            ids = pc.struct_field(neighbours, "caption_id")
            wanted |= _is_in(ids, pa.array(sorted(caption_ids), pa.int64()))
        if keys:
            column = pc.struct_field(neighbours, "text")
            known = [text for text in column.unique().to_pylist() if not keys.isdisjoint(_keys([text]))]
            wanted |= _is_in(column, pa.array(known, pa.string()))
        if sources:
            lists = pc.struct_field(neighbours, "sources")
            rows = pc.list_parent_indices(lists).to_numpy()
            wanted[rows[_is_in(lists.flatten(), pa.array(sorted(sources), pa.string()))]] = True
        return wanted

    values = {field.name: getattr(captions, field.name) for field in fields(captions)}
    return TracedCaptions(**values, held=held)


def _is_in(values: pa.Array, wanted: pa.Array) -> np.ndarray:
    return pc.is_in(values, value_set=wanted).to_numpy(zero_copy_only=False)


def _keys(texts: set[str] | frozenset[str] | list[str]) -> set[bytes]:
    if not texts:
        return set()
    from index_builder.dumps.cleaning import caption_key

    return set(map(caption_key, texts))


def _source_name(wanted: str, record: RunRecord) -> str:
    """Returns a source's name in the index, which also knows its URI; the name itself where the index is gone.

    Raises:
        ConfigError: The index has no such source.
    """
    try:
        manifest = load_manifest(record.config["index"] or "", record.index_id)
    except (ManifestError, StorageError):
        return wanted
    names = {name: source.name or source.uri for source in manifest.sources for name in (source.name, source.uri)}
    if wanted not in names:
        raise ConfigError(
            "The index of this run has no such source.",
            where=f"--source {wanted}",
            expected=", ".join(dict.fromkeys(names.values())),
            found=wanted,
        )
    return names[wanted]


def write(found: TracedCaptions, options: TraceOptions) -> str:
    """Writes the rows to the file that the options name, and returns in a line how many they are."""
    kind: ExportFormat = "csv" if options.out.removesuffix(".gz").endswith(".csv") else "jsonl"
    count = export_captions(found, options.out, kind)
    return f"{describe_count(count, 'row')}: {options.out}"
