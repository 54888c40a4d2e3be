"""Copies a run's captions into a file of another format, or describes them in a card for a data set."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.captioning.record import RunRecord, load_existing_run
from jobs.terminal.call_options import ExportOptions
from smallcap import storage
from smallcap.output.export import export_captions
from smallcap.output.reading import read_captions
from smallcap.phrasing import describe_count, describe_counts


def run(options: ExportOptions) -> str:
    """Writes the file, and returns in a line what it holds.

    Raises:
        ConfigError: There is no run, or it lacks a column.
        RunError: The run is damaged, or the storage fails.
    """
    record = load_existing_run(options.run)
    if options.to == "card":
        storage.write_bytes(options.out, ("\n".join(_card(options.run, record)) + "\n").encode())
        return f"A card of the run: {options.out}"
    captions = read_captions(options.run, options.columns or None, None if options.failed else "ok")
    count = export_captions(captions, options.out, options.to, options.raw)
    unfinished = "" if record.status == "complete" else "; the run is not complete"
    return f"{describe_count(count, 'row')}: {options.out}{unfinished}"


def _card(path: str, record: RunRecord) -> Iterator[str]:
    """Yields the lines of a README.md as the Hugging Face hub shows it beside the run's parts."""
    images, config = record.images, record.config
    captions = read_captions(path)
    yield from ("---", "task_categories: [image-to-text]", "tags: [image-captioning, smallcap]", "configs:")
    yield from ("- config_name: default", '  data_files: "part-*.parquet"', "---", "")
    yield from (f"# Captions of run {record.run_id}", "")
    made_by = "[SmallCap](https://arxiv.org/abs/2209.15323)"
    yield f"Captions that {made_by} generated for {describe_count(images.ok, 'image')}."
    if record.status != "complete":
        yield "The run is not complete."
    if images.error:
        yield f"{describe_count(images.error, 'image')} failed: {describe_counts(images.errors_by_code)}."
    yield from ("", "| | |", "|---|---|")
    yield f"| model | `{record.model_id}` |"
    yield f"| index version | `{record.index_id or 'none: without retrieval'}` |"
    yield f"| retrieval encoder | `{record.retrieval_encoder or 'none'}` |"
    yield f"| generation | {', '.join(f'`{name}={value}`' for name, value in config['generation'].items())} |"
    yield f"| versions | {', '.join(f'{name} {version}' for name, version in record.versions.items())} |"
    yield from ("", "| column | type |", "|---|---|")
    yield from (f"| `{field.name}` | `{field.type}` |" for field in captions.schema)
    yield from ("", "Nothing is known here of the images' licence, nor of the licence of the captions in the index.")
