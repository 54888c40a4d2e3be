"""Reads a run, or two on the same images, once: the rows to show, and figures of all rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smallcap.output.reading import Captions, read_captions
from smallcap.output.schema import STATUS_ERROR, STATUS_OK
from smallcap.report.measures import COLUMN_MEASURES, NEIGHBOUR_SCORE, RUN_MEASURES, Distribution
from smallcap.report.sampling import Row, Smallest, name_keys

_LOW_SHARE, _FAILED_SHARE = 10, 100  # a tenth of the rows have the lowest scores, and a hundredth has each error
_EXAMPLES = 5  # images that are named for each error code
_MOST_NEIGHBOURS = 16  # of a row
_LENGTHS = (400, 200, 100, 50)  # characters to which texts are shortened until they fit


@dataclass
class RunFigures:
    """Figures of a run's rows.

    Attributes:
        ok: The number of captions.
        empty: The number of captions without a character.
        errors: The number of failed images, by code.
        examples: For each code, some failed images with their messages.
        distributions: How each measure's values lie.
    """

    ok: int = 0
    empty: int = 0
    errors: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    examples: dict[str, list[Row]] = field(default_factory=dict)
    distributions: dict[str, Distribution] = field(
        default_factory=lambda: {measure.name: Distribution(measure) for measure in RUN_MEASURES}
    )

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds a batch of rows."""
        codes = batch["error_code"].filter(pc.equal(batch["status"], STATUS_ERROR))
        for found in pc.value_counts(codes).to_pylist():
            self.errors[found["values"] or ""] += found["counts"]
        captions = batch["caption"].filter(pc.equal(batch["status"], STATUS_OK))
        self.ok += len(captions)
        self.empty += pc.sum(pc.equal(pc.utf8_trim_whitespace(captions), "")).as_py() or 0
        for measure in COLUMN_MEASURES:
            self.distributions[measure.name].add(_numbers(batch[measure.name]))
        neighbours = batch["neighbours"]
        some = neighbours.filter(pc.greater(pc.list_value_length(neighbours), 0))
        if len(some):
            self.distributions[NEIGHBOUR_SCORE.name].add(_numbers(pc.struct_field(pc.list_element(some, 0), "score")))


def _numbers(values: pa.Array) -> np.ndarray:
    return values.drop_null().to_numpy(zero_copy_only=False)


class _Chooser:
    """Chooses the rows of a report while the run is read.

    Args:
        count: The most rows.
        changed: Keys of images whose captions differ between two runs, sorted; half of the rows are of these.
        is_readable: Says of an image's URI whether its file can be read at a bearable cost.
    """

    def __init__(self, count: int, changed: np.ndarray, is_readable: Callable[[str], bool] | None) -> None:
        self._count, self._changed_keys, self._is_readable = count, changed, is_readable
        self._drawn, self._low = Smallest(count), Smallest(count // _LOW_SHARE)
        self._changed = Smallest(count // 2)
        self._failed: dict[str, Smallest] = {}

    def offer(self, batch: pa.RecordBatch) -> None:
        keys = name_keys(batch["image_id"].to_pylist())
        is_ok = _flags(pc.equal(batch["status"], STATUS_OK))
        readable = is_ok
        if self._is_readable is not None:
            readable = is_ok & np.array([self._is_readable(uri or "") for uri in batch["image_uri"].to_pylist()], bool)
        self._drawn.offer(batch, keys, readable)
        self._changed.offer(batch, keys, _are_among(keys, self._changed_keys))
        scores = batch["clip_score"].to_numpy(zero_copy_only=False)
        self._low.offer(batch, scores, is_ok & np.isfinite(scores))
        for code in pc.unique(batch["error_code"]).drop_null().to_pylist():
            heap = self._failed.setdefault(code, Smallest(self._count))
            heap.offer(batch, keys, _flags(pc.equal(batch["error_code"], code)))

    def examples(self) -> dict[str, list[Row]]:
        return {code: heap.rows()[:_EXAMPLES] for code, heap in self._failed.items()}

    def chosen(self) -> list[Row]:
        """Returns each chosen row once: some of every kind first, then what was drawn, as far as there is room."""
        failed = [heap.rows() for heap in self._failed.values()]
        some = max(_EXAMPLES, self._count // _FAILED_SHARE)
        first = chain.from_iterable(rows[:some] for rows in failed)
        more = chain.from_iterable(rows[some:] for rows in failed)
        ordered = chain(first, self._low.rows(), self._changed.rows(), self._drawn.rows(), more)
        rows = {row["image_id"]: row for row in ordered}
        return list(rows.values())[: self._count]


def _are_among(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Says which keys are among sorted ones, [n] bool; `np.isin` would sort them each time."""
    if not len(ordered):
        return np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return np.asarray(ordered[places] == keys)


def _flags(values: pa.Array) -> np.ndarray:
    return np.asarray(values.fill_null(False).to_numpy(zero_copy_only=False), bool)


@dataclass(frozen=True)
class RunRows:
    """What a report shows of one or two runs.

    Attributes:
        figures: The figures of each run.
        rows: What the page gets of each image, sorted by id: `id`, `uri`, `size`, and of each run a caption with all
            that belongs to it, an error, or None.
        both, changed: The number of images that both runs have, and of those with another caption; 0 for one run.
    """

    figures: tuple[RunFigures, ...]
    rows: list[Row]
    both: int = 0
    changed: int = 0


def read_run_rows(runs: Sequence[str], count: int, is_readable: Callable[[str], bool] | None = None) -> RunRows:
    """Reads the rows of one or two runs, and chooses which are shown.

    All rows are shown where there are no more than `count`. Otherwise images are drawn, besides those with the lowest
    scores, some of every error, and, of two runs, those whose captions differ.

    Args:
        runs: The runs' folders or prefixes.
        count: The most rows to show.
        is_readable: Says of an image's URI whether its file can be read at a bearable cost; others are not drawn.

    Raises:
        ConfigError: There is no run.
        SchemaError: A part is damaged.
        StorageError: The service fails.
    """
    opened = [read_captions(run) for run in runs]
    both, changed = _compare(opened) if len(opened) > 1 else (0, np.empty(0, np.uint64))
    first = RunFigures()
    chooser = _Chooser(count, changed, is_readable)
    for batch in opened[0]:
        first.add(batch)
        chooser.offer(batch)
    first.examples = chooser.examples()
    chosen = {row["image_id"]: [row] for row in chooser.chosen()}
    figures = [first]
    for captions in opened[1:]:
        figures.append(_read_others(captions, chosen))
    ordered = sorted(chosen.items())
    flags = _are_among(name_keys(image_id for image_id, _ in ordered), changed).tolist()
    rows = [_page_row(of_runs, flag) for (_, of_runs), flag in zip(ordered, flags, strict=True)]
    return RunRows(tuple(figures), rows, both, len(changed))


def _read_others(captions: Captions, chosen: dict[str, list[Row]]) -> RunFigures:
    """Reads a second run; adds to each chosen image its row there."""
    figures = RunFigures()
    examples: dict[str, Smallest] = defaultdict(lambda: Smallest(_EXAMPLES))
    wanted = pa.array(sorted(chosen), pa.string())
    found: dict[str, Row] = {}
    for batch in captions:
        figures.add(batch)
        rows = batch.filter(pc.is_in(batch["image_id"], value_set=wanted)).to_pylist()
        found |= {row["image_id"]: row for row in rows}
        keys = name_keys(batch["image_id"].to_pylist())
        for code in pc.unique(batch["error_code"]).drop_null().to_pylist():
            examples[code].offer(batch, keys, _flags(pc.equal(batch["error_code"], code)))
    figures.examples = {code: heap.rows() for code, heap in examples.items()}
    for image_id, of_runs in chosen.items():
        of_runs.append(found.get(image_id, {}))
    return figures


def _compare(runs: Sequence[Captions]) -> tuple[int, np.ndarray]:
    """Returns how many images two runs share, and the sorted keys of those whose captions differ, [n] uint64."""
    (ids, captions), (other_ids, other_captions) = map(_keys_of, runs)
    shared, places, others = np.intersect1d(ids, other_ids, return_indices=True)
    return len(shared), shared[captions[places] != other_captions[others]]


def _keys_of(captions: Captions) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keys of a run's images and of their captions, [n] uint64 each; errors count as captions of a kind."""
    ids, texts = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for batch in read_captions(captions.run, ["image_id", "caption", "error_code"]):
        ids.append(name_keys(batch["image_id"].to_pylist()))
        codes = pc.binary_join_element_wise("\0", batch["error_code"], "")
        texts.append(name_keys(pc.coalesce(batch["caption"], codes).to_pylist()))
    return np.concatenate(ids), np.concatenate(texts)


def _page_row(of_runs: Sequence[Row], changed: bool) -> Row:
    row = of_runs[0]
    return {
        "id": row["image_id"],
        "uri": row["image_uri"],
        "size": next(([one["width"], one["height"]] for one in of_runs if one.get("width")), None),
        "changed": changed,
        "runs": [_page_caption(one) if one else None for one in of_runs],
    }


def _page_caption(row: Row) -> dict[str, Any]:
    if row["status"] == STATUS_ERROR:
        return {"code": row["error_code"], "message": row["error_message"] or ""}
    neighbours = row["neighbours"] or []
    values = {measure.name: row[measure.name] for measure in COLUMN_MEASURES}
    values[NEIGHBOUR_SCORE.name] = neighbours[0]["score"] if neighbours else None
    return {
        "caption": row["caption"] or "",
        "values": {name: rounded for name, value in values.items() if (rounded := _rounded(value)) is not None},
        "alternatives": [[one["caption"], _rounded(one["logprob"])] for one in row["alternatives"] or []],
        "neighbours": [
            {
                "id": one["caption_id"],
                "text": one["text"],
                "score": _rounded(one["score"]),
                **({"sources": one["sources"]} if one["sources"] else {}),
            }
            for one in neighbours[:_MOST_NEIGHBOURS]
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, 5)


def fit_texts(rows: Sequence[Row], most_bytes: int) -> None:
    """Shortens the captions, neighbours and messages of rows, all alike, until they fit as far as that goes."""
    for longest in _LENGTHS:
        for row in rows:
            row["runs"] = _shortened(row["runs"], longest)
        if sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in rows) <= most_bytes:
            return


def _shortened(value: Any, longest: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= longest else f"{value[: longest - 1]}…"
    if isinstance(value, dict):
        return {name: _shortened(inner, longest) for name, inner in value.items()}
    return [_shortened(inner, longest) for inner in value] if isinstance(value, list) else value
