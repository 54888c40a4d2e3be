"""Writes a page about a run, about two runs side by side, or about an index; `smallcap.report` knows what is on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import pyarrow.compute as pc

from jobs.captioning.record import Attempt, RunRecord, load_existing_run
from jobs.captioning.stage_report import STAGES
from jobs.cluster.display import show_while
from jobs.kinds import find_kind
from jobs.terminal.call_options import ReportOptions
from smallcap import __version__, storage
from smallcap.config import CaptionConfig, InputConfig
from smallcap.errors import ConfigError, RowError
from smallcap.images.work_list import load_work_list
from smallcap.index.manifest import IndexManifest, utc_now
from smallcap.options import load_config
from smallcap.output.part_files import RUN_FILE
from smallcap.output.variant_runs import runs_in
from smallcap.phrasing import describe_count, describe_duration
from smallcap.redaction import hide_secrets
from smallcap.report.datastore import Datastore, read_datastore
from smallcap.report.measures import CLIP_SCORE, COPIED_SHARE, RUN_MEASURES, histogram
from smallcap.report.page import as_script_text, render_page
from smallcap.report.run_rows import RunFigures, RunRows, fit_texts, read_run_rows
from smallcap.report.thumbnails import Containers, read_thumbnails

_PAGE_BYTES = 23_000_000  # of rows and pictures; with all else a page stays below 25 MB
_TEXT_BYTES = 14_000_000  # of rows
_LETTERS = "AB"
_REASONS = {
    "malformed": "not readable as a row with a text",
    "bad_embedding": "an embedding that is zero or not finite",
    "empty": "no text, or only white space",
    "too_few_words": "fewer words than asked for",
    "url": "holds a web address",
    "markup": "holds markup",
    "repeated_characters": "holds long repetitions",
    "blocklisted": "holds a word of the blocklist",
    "too_long": "more tokens than asked for",
    "duplicate": "another row has the same text, apart from case, width and spaces",
    "removed": "removed after it was built",
}


def run(options: ReportOptions) -> str:
    """Writes the page, and returns in a line where it is and what it shows.

    Raises:
        ConfigError: There is neither a run nor an index, or the two cannot be shown side by side.
        RunError: What is there is damaged, or the storage fails.
    """
    paths = [storage.absolute(path) for path in (options.path, options.other) if path is not None]
    if len(paths) == 1 and (variants := runs_in(paths[0])) != paths:
        paths, others = variants[:2], variants[2:]
    else:
        others = []
    kinds = [find_kind(path, ("run", "index")) for path in paths]
    if len(paths) == 2 and "index" in kinds:
        raise ConfigError(
            "Only runs are shown side by side.",
            where=paths[kinds.index("index")],
            expected="two captioning runs, or one index",
            found="an index",
            remedy="Write a report of each.",
        )
    if kinds == ["run"]:
        paths += _refreshed_run(paths[0])
    page, shown = _run_page(paths, options.rows) if kinds[0] == "run" else _index_page(paths[0], options.rows)
    storage.write_bytes(options.out, page)
    said = f"Report: {options.out}, {len(page) / 1e6:,.1f} MB, {shown}"
    if others:
        said += f"\nIt shows the first two variants; smallcap report {paths[0]} {others[0]} shows another."
    return said


def _refreshed_run(path: str) -> list[str]:
    """Returns the run from which a refresh was made, if it is still there: its captions are those of before."""
    refreshed = load_existing_run(path).refreshed
    is_there = refreshed is not None and storage.exists(storage.join(refreshed.run, RUN_FILE))
    return [refreshed.run] if refreshed is not None and is_there else []


def _run_page(paths: Sequence[str], count: int) -> tuple[bytes, str]:
    records = [load_existing_run(path) for path in paths]
    containers = _containers(paths[0])
    readable = None if containers.has_all else containers.is_readable
    with show_while(f"Reading the captions of {' and '.join(paths)}"):
        read = read_run_rows(paths, count, readable)
        fit_texts(read.rows, _TEXT_BYTES)
    measures = [
        found
        for measure in RUN_MEASURES
        if (found := histogram([figures.distributions[measure.name] for figures in read.figures]))
    ]
    data = {
        "kind": "run",
        "rows": read.rows,
        "measures": measures,
        "low": [_low_score(figures) for figures in read.figures],
        "timelines": [_timelines(record) for record in records],
    }
    uris = list(dict.fromkeys(row["uri"] for row in read.rows if row["uri"] and _has_caption(row)))
    with show_while(f"Reading {describe_count(len(uris), 'image')}"):
        left = _PAGE_BYTES - len(as_script_text(data).encode())
        thumbnails = read_thumbnails(uris, max(left, 0), containers, _input_config(records[0]))
    for row in read.rows:
        thumbnail = thumbnails.get(row["uri"]) if _has_caption(row) else None
        row |= {name: row[name] and hide_secrets(row[name]) for name in ("id", "uri")}  # a page is passed on
        row.update({"missing": thumbnail.what} if isinstance(thumbnail, RowError) else {"image": thumbnail})
    total = read.figures[0].ok + sum(read.figures[0].errors.values())
    facts = _about(paths) | {
        "kind": "run",
        "tiles": list(_run_tiles(records, read)),
        "shown": len(read.rows),
        "total": total,
        "errors": [_errors(figures) for figures in read.figures],
        "failed": sum(sum(figures.errors.values()) for figures in read.figures),
        "attempts": [list(map(_attempt, record.attempts)) for record in records],
        "identity": [_run_identity(record) for record in records],
        "options": list(_options(records)),
    }
    return render_page(facts, data), f"{len(read.rows):,} of {describe_count(total, 'image')}"


def _containers(path: str) -> Containers:
    work = load_work_list(path)
    packed = work is not None and pc.any(pc.not_equal(work.fragments.table["kind"], "uris")).as_py()
    return Containers(work.fragments if work and packed else ())  # a list of images has very many fragments


def _input_config(record: RunRecord) -> InputConfig:
    return load_config(CaptionConfig, base=record.config).input


def _has_caption(row: Mapping[str, Any]) -> bool:
    """Says whether a run has captioned an image, so that it can be decoded, and without harm."""
    return any(one and "caption" in one for one in row["runs"])


def _low_score(figures: RunFigures) -> float | None:
    """Returns the score below which the lowest 5% of the captions are; None without scores."""
    cell = figures.distributions[CLIP_SCORE.name].quantile(0.05)
    return None if cell is None else cell + CLIP_SCORE.step


def _about(paths: Sequence[str]) -> dict[str, Any]:
    named = [
        {"letter": letter, "name": _name(path), "path": path} for letter, path in zip(_LETTERS, paths, strict=False)
    ]
    return {"subjects": named, "made_at": utc_now(), "version": __version__}


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def _tile(label: str, values: Sequence[str], notes: Sequence[str]) -> dict[str, Any]:
    return {"label": label, "values": list(zip(values, notes, strict=True))}


def _run_tiles(records: Sequence[RunRecord], read: RunRows) -> Iterator[dict[str, Any]]:
    """Yields the figures at the top of the page; each has a value and a note for each run."""
    counts = [(figures.ok, sum(figures.errors.values())) for figures in read.figures]
    empty = [f", {describe_count(figures.empty, 'empty caption')}" if figures.empty else "" for figures in read.figures]
    states = [f"{record.status}{note}" for record, note in zip(records, empty, strict=True)]
    yield _tile("Images", [f"{ok + failed:,}" for ok, failed in counts], states)
    if len(records) == 2:
        share = f"{read.changed / read.both:.1%} of {read.both:,} shared images" if read.both else "no shared images"
        yield _tile("Captions changed", [f"{read.changed:,}"], [share])
    shares = [f"{failed / max(1, ok + failed):.2%}" if failed else "no errors" for ok, failed in counts]
    yield _tile("Failed", [f"{failed:,}" for _, failed in counts], shares)
    for measure, note in ((CLIP_SCORE, "5% are below {low:.3f}"), (COPIED_SHARE, "mean of {count:,} captions")):
        found = [figures.distributions[measure.name].summary() for figures in read.figures]
        if any(one["count"] for one in found):
            values = [_formatted(one["mean"], measure is COPIED_SHARE) for one in found]
            yield _tile(measure.label, values, [note.format(**one) if one["count"] else "" for one in found])
    speeds = [_speed(record) for record in records]
    if any(value for value, _ in speeds):
        yield _tile("Images/s", [value or "–" for value, _ in speeds], [note for _, note in speeds])


def _formatted(mean: float | int | None, as_percent: bool) -> str:
    if mean is None:
        return "–"
    return f"{mean:.0%}" if as_percent else f"{mean:.3f}"


def _speed(record: RunRecord) -> tuple[str, str]:
    """Returns a run's images/s over all its attempts, and how long they took."""
    images = sum(attempt.images for attempt in record.attempts)
    seconds = sum(attempt.seconds or 0.0 for attempt in record.attempts)
    if not images or not seconds:
        return "", ""
    return f"{images / seconds:,.1f}", f"{describe_duration(seconds)}, start included"


def _errors(figures: RunFigures) -> list[dict[str, Any]]:
    total = figures.ok + sum(figures.errors.values())
    return [
        {
            "code": code,
            "count": count,
            "share": count / total,
            "examples": [
                {"id": row["image_id"], "message": row["error_message"] or ""} for row in figures.examples.get(code, ())
            ],
        }
        for code, count in sorted(figures.errors.items(), key=lambda item: (-item[1], item[0]))
    ]


def _attempt(attempt: Attempt) -> dict[str, Any]:
    busy = {"load": attempt.decode_s, "caption": attempt.caption_s, "write": attempt.write_s}
    rate = attempt.images / attempt.seconds if attempt.seconds else None
    return {
        "started_at": _when(attempt.started_at),
        "images": attempt.images,
        "took": describe_duration(attempt.seconds) if attempt.seconds is not None else "did not end",
        "rate": f"{rate:,.1f}" if rate is not None else "–",
        "busy": [f"{seconds:,.1f} s" if (seconds := busy[stage]) is not None else "–" for stage in STAGES],
        "where": ", ".join(filter(None, (describe_count(attempt.actors or 0, "actor"), attempt.device, attempt.dtype))),
        "retries": attempt.fetch_retries or 0,
    }


def _when(text: str) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S} UTC"


def _timelines(record: RunRecord) -> list[dict[str, Any]]:
    return [
        {"started_at": _when(attempt.started_at), **attempt.timeline.model_dump()}
        for attempt in record.attempts
        if attempt.timeline is not None
    ]


def _run_identity(record: RunRecord) -> list[tuple[str, str]]:
    config = record.config
    listed = record.input
    rows = [
        ("Run", record.run_id),
        ("Model", f"{config['model']}  ({record.model_id})"),
        *_indexes_of(record),
        ("Retrieval encoder", record.retrieval_encoder or "–"),
        ("Images from", ", ".join(config["images"])),
        ("Listed", _when(listed.listed_at) if listed else "–"),
        ("Named more than once", f"{record.count_repeated():,}"),
        ("Passed over", f"{sum(record.count_passed_over().values()):,}"),
    ]
    if record.refreshed is not None:
        rows.append(("Refresh of", f"{record.refreshed.run}  ({record.refreshed.run_id})"))
    return [*rows, ("Versions", ", ".join(f"{name} {version}" for name, version in record.versions.items()))]


def _indexes_of(record: RunRecord) -> list[tuple[str, str]]:
    if len(record.indexes) > 1:
        return [
            (f"Index {index.name}", f"{index.uri}  (version {index_id}, weight {index.weight:g})")
            for index, index_id in record.indexes
        ]
    uri = next((index.uri for index, _ in record.indexes), "none: without retrieval")
    return [("Index", uri), ("Index version", record.index_id or "–")]


def _options(records: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """Yields the options of the runs, and whether they differ."""
    flat = [dict(_flattened(record.config)) for record in records]
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key, "") for one in flat]
        yield {"key": key, "values": values, "differs": len(set(values)) > 1}


def _flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
            yield f"{prefix}{name}", shown


def _index_page(path: str, count: int) -> tuple[bytes, str]:
    with show_while(f"Reading the captions of {path}"):
        store = read_datastore(path, count)
    manifest, near = store.manifest, store.near_duplicates
    data = {
        "kind": "index",
        "rows": store.rows,
        "measures": [found for one in store.lengths if (found := histogram([one]))],
    }
    rows_read = sum(source.rows for source in manifest.sources)
    facts = _about([path]) | {
        "kind": "index",
        "tiles": list(_index_tiles(store)),
        "shown": len(store.rows),
        "total": manifest.ntotal,
        "sources": [
            {
                "name": source.name,
                "uri": source.uri,
                "rows": source.rows,
                "captions": store.by_source.get(source.name, 0),
            }
            for source in manifest.sources
        ],
        "rows_read": rows_read,
        "dropped": [
            {
                "reason": reason,
                "count": dropped,
                "share": dropped / max(1, rows_read),
                "about": _REASONS.get(reason, ""),
            }
            for reason, dropped in sorted(manifest.dropped.items(), key=lambda item: -item[1])
            if dropped
        ],
        "near": near,
        "files": _index_files(manifest),
        "identity": [_index_identity(manifest)],
        "recall": manifest.recall,
    }
    return render_page(facts, data), f"{len(store.rows):,} of {describe_count(manifest.ntotal, 'caption')}"


def _index_tiles(store: Datastore) -> Iterator[dict[str, Any]]:
    manifest, near = store.manifest, store.near_duplicates
    removed = manifest.id_count - manifest.ntotal
    yield _tile("Captions", [f"{manifest.ntotal:,}"], [f"{removed:,} removed" if removed else "none removed"])
    dropped = sum(manifest.dropped.values())
    yield _tile("Dropped rows", [f"{dropped:,}"], [f"of {sum(one.rows for one in manifest.sources):,} that were read"])
    share = near.captions / near.compared if near.compared else 0.0
    yield _tile("Nearly the same", [f"{share:.1%}"], [f"{near.captions:,} captions in {near.groups:,} groups"])
    yield _tile("With an image", [f"{store.with_images / max(1, manifest.ntotal):.0%}"], ["name the image they are of"])
    size = sum(entry.bytes for entry in manifest.files)
    yield _tile("Size", [f"{size / 1e6:,.1f} MB"], [describe_count(len(manifest.shards), "shard")])
    if manifest.recall:
        entry = manifest.recall[0]
        yield _tile(f"Recall@{entry.k}", [f"{entry.recall:.3f}"], [f"{entry.queries_per_s:,.0f} queries/s"])


def _index_files(manifest: IndexManifest) -> list[dict[str, Any]]:
    removed = (manifest.removed,) if manifest.removed else ()
    kinds = {
        "vectors in the index": manifest.shards,
        "texts": manifest.captions,
        "vectors for exact scores": manifest.vectors,
        "template": (manifest.template,),
        "removed ids": removed,
    }
    return [
        {"kind": kind, "files": len(entries), "bytes": sum(entry.bytes for entry in entries)}
        for kind, entries in kinds.items()
        if entries
    ]


def _index_identity(manifest: IndexManifest) -> list[tuple[str, str]]:
    filters = ", ".join(f"{name}: {value}" for name, value in manifest.filters.items() if value not in (None, [], ""))
    return [
        ("Version", manifest.index_id),
        ("Made", f"{_when(manifest.created_at)}, by smallcap {manifest.builder_version} ({manifest.operation})"),
        ("Made from versions", ", ".join(manifest.parents) or "–"),
        ("Retrieval encoder", f"{manifest.encoder.spec}  ({manifest.encoder.weights_sha256[:12]})"),
        ("Vectors", f"{manifest.dim} dimensions, {manifest.codec}"),
        ("Index key", manifest.index_key),
        ("Lists searched", f"{manifest.nprobe} of {manifest.nlist}" if manifest.nlist else "all vectors"),
        ("Filters", filters or "–"),
    ]
