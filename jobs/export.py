"""Copies a run's captions into a file, a table or a data set of another format, or describes them in a card."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.captioning.record import RunRecord, load_existing_run
from jobs.terminal.call_options import ExportOptions
from smallcap import storage
from smallcap.config import InputConfig
from smallcap.output.dataset_export import export_dataset, front_matter
from smallcap.output.export import export_captions
from smallcap.output.reading import Captions, read_captions
from smallcap.output.table_export import export_table
from smallcap.output.tar_export import NEEDED_COLUMNS, TarExport
from smallcap.phrasing import describe_count, describe_counts


def run(options: ExportOptions) -> str:
    """Writes the file, and returns in a line what it holds.

    Raises:
        ConfigError: There is no run, it lacks a column, or what is in the place of a table or folder is something else
            than an export of this run.
        RunError: The run is damaged, or the storage fails.
    """
    record = load_existing_run(options.run)
    unfinished = "" if record.status == "complete" else "; the run is not complete"
    if options.to == "card":
        lines = [*front_matter("part-*.parquet"), *_card(record, read_captions(options.run))]
        storage.write_bytes(options.out, ("\n".join(lines) + "\n").encode())
        return f"A card of the run: {options.out}"
    if options.to == "webdataset":
        return _export_tars(options, record) + unfinished
    captions = read_captions(options.run, options.columns or None, None if options.failed else "ok")
    there = False
    if options.to == "jsonl" or options.to == "csv":  # noqa: PLR1714 - mypy tells them apart so
        export_captions(captions, options.out, options.to, options.raw)
    elif options.to == "hf":
        there = export_dataset(captions, record.run_id, list(_card(record, captions)), options.out)
    else:
        there = export_table(captions, record.run_id, options.to, options.out)
    told = "; they were there already" if there else ""
    return f"{describe_count(len(captions), 'row')}: {options.out}{told}{unfinished}"


def _export_tars(options: ExportOptions, record: RunRecord) -> str:
    columns = options.columns or tuple(read_captions(options.run).schema.names)
    captions = read_captions(options.run, list(dict.fromkeys((*columns, *NEEDED_COLUMNS))), "ok")
    config = InputConfig.model_validate(record.config["input"]) if options.images else None
    samples, left_out = TarExport(captions, record.run_id, columns, config).write(options.out)
    line = f"{describe_count(samples, 'sample')}: {options.out}"
    if not left_out:
        return line
    lost = describe_count(sum(left_out.values()), "image")
    return (
        f"{line}; without {lost} that could not be read again ({describe_counts(left_out)}): the same command "
        "tries them once more, and --no-images needs none"
    )


def _card(record: RunRecord, captions: Captions) -> Iterator[str]:
    """Yields what a README.md says of a run, for people who find its captions without it."""
    images, config = record.images, record.config
    yield f"# Captions of run {record.run_id}"
    yield ""
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
