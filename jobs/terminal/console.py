"""Prints results, and the demo's examples, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from jobs.screen import VisibleConsole
from smallcap.output.reading import read_captions
from smallcap.phrasing import describe_count, visible

if TYPE_CHECKING:  # they import torch and faiss, which most commands do not need
    from smallcap.benchmark.ready_captioner import HostResult
    from smallcap.benchmark.stages import BenchmarkResult
    from smallcap.index.retriever import Neighbour
    from smallcap.output.reading import Captions

_SAMPLE_COLUMNS = (
    *("image_id", "key", "files", "caption_id", "caption", "text", "clip_score", "status", "error_code"),
    *("step", "epoch", "loss", "tokens"),
)
_ERROR_COLUMNS = ("image_id", "error_code", "error_message")

out = VisibleConsole()
news = VisibleConsole(is_news=True)


def print_neighbours(neighbours: Sequence[Neighbour]) -> None:
    """Prints retrieved captions, nearest first."""
    table = _table("score", "id", "caption", right=("score", "id"))
    for neighbour in neighbours:
        table.add_row(f"{neighbour.score:.4f}", str(neighbour.caption_id), cell(neighbour.text))
    out.print(table)


def print_samples(run: str, count: int) -> None:
    """Prints the `count` images of a small run with the highest CLIP scores, and the captions retrieved for them."""
    captions = read_captions(run, ["image_id", "caption", "clip_score", "neighbours"], status="ok")
    for row in sorted(captions.rows(), key=lambda row: -(row["clip_score"] or 0))[:count]:
        score = f"  (clip score {row['clip_score']:.2f})" if row["clip_score"] is not None else ""
        shown_id, caption = cell(row["image_id"], "cyan"), cell(row["caption"], "bold")
        news.print(Text.assemble(shown_id, "  ", caption, (score, "dim")))
        for neighbour in row["neighbours"]:
            news.print(cell(f"    {neighbour['score']:.2f}  {neighbour['text']}", "dim"))


def print_traced(found: Captions, count: int) -> None:
    """Prints up to `count` images with the captions looked for that were in their prompts, and how many there are."""
    table = _table("image", "caption", "retrieved")
    for row in islice(found.rows(), count):
        retrieved = Text("\n").join(cell(neighbour["text"], "dim") for neighbour in row["neighbours"])
        table.add_row(cell(row["image_id"], "cyan"), cell(row["caption"], "bold"), retrieved)
    if table.rows:
        out.print(table)
    out.print(f"{describe_count(len(found), 'image')} had such a caption in the prompt.")


def print_swap(rows: Sequence[Mapping[str, str]]) -> None:
    """Prints images with their captions before and after the datastore was swapped, and a reference caption."""
    table = _table("image", "with the first index", "with their own", "reference")
    for row in rows:
        table.add_row(
            cell(row["image"], "cyan"), cell(row["before"]), cell(row["after"], "bold"), cell(row["reference"], "dim")
        )
    news.print(table)


def print_versions(versions: Sequence[Mapping[str, Any]]) -> None:
    """Prints an index's versions, the current one marked with a star."""
    figures = ("captions", "recall@4")
    table = _table("", "version", "made (UTC)", "by", "captions", "key", "recall@4", right=figures)
    for version in versions:
        mark = Text("*", style="bold green") if version["current"] else Text("")
        made = version["created_at"][:16].replace("T", " ")
        values = (version[name] for name in ("operation", "ntotal", "index_key"))
        recall = version["recall"].get("recall@4")
        described = (cell(_compact(value)) for value in (*values, recall))
        table.add_row(mark, cell(version["index_id"]), cell(made), *described)
    out.print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Prints nested facts as an aligned list, with `samples`, or `errors` in place of them, at the end as a table."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name not in ("samples", "errors"):
            table.add_row(name, cell(_compact(value)))
    out.print(table)
    wanted, rows = (_ERROR_COLUMNS, facts["errors"]) if "errors" in facts else (_SAMPLE_COLUMNS, facts["samples"])
    if rows:
        out.print()
        columns = [name for name in wanted if name in rows[0]]
        listed = _table(*columns)
        for row in rows:
            listed.add_row(*(cell(_compact(row.get(name))) for name in columns))
        out.print(listed)


def print_benchmark(result: BenchmarkResult) -> None:
    """Prints the figures of `smallcap bench`: stages, and the whole loop."""
    machine = result.machine
    out.print(
        f"{machine['device']}, {describe_count(machine['threads'], 'thread')}, {machine['dtype']}, "
        f"torch {machine['torch']}, "
        f"commit {machine['commit'] or '–'}: matrix products at {result.matrix_tflops:.3f} TFLOP/s",
        soft_wrap=True,
    )
    figures = ("images/s", "GFLOP/image", "TFLOP/s", "share")
    table = _table("stage", *figures, right=figures)
    for stage in result.stages:
        counted = (stage.gflop_per_image, stage.tflops, stage.share)
        gflop, tflops, share = ("", "", "") if None in counted else ("{:,.2f}", "{:,.3f}", "{:.0%}")
        formats = zip((gflop, tflops, share), counted, strict=True)
        table.add_row(stage.stage, f"{stage.images_per_s:,.1f}", *(form.format(value) for form, value in formats))
    out.print(table)
    lengths = f"captions of {result.mean_caption_tokens:.1f} tokens, prompts of {result.mean_prompt_tokens:.0f} tokens"
    out.print(
        f"whole loop, {lengths}: {result.images_per_s:,.2f} images/s, {result.mfu:.0%} of the matrix rate",
        soft_wrap=True,
    )
    out.print(
        f"whole loop, captions of 25 tokens: {result.images_per_s_full_length:,.2f} images/s, "
        f"{result.mfu_full_length:.0%} of the matrix rate",
        soft_wrap=True,
    )
    out.print(f"decode: fast differs from exact by {result.fast_decode_difference:.2f} of 255 on average")


def print_host_benchmark(result: HostResult) -> None:
    """Prints the figures of `smallcap bench --host`."""
    table = _table("part", "µs/image", right=("µs/image",))
    for part, us in result.parts.items():
        table.add_row(part, f"{us:.1f}")
    table.add_row("sum", f"{result.us_per_image:.1f}")
    out.print(table)
    out.print(
        f"CPU time of the process; at most {result.images_per_s:,.0f} images/s for one Python thread", soft_wrap=True
    )


def cell(value: str, style: str = "") -> Text:
    """Returns a value of a file or a store as text that stays in its line, also where it holds line breaks."""
    return Text(visible(value, kept=""), style=style)


def _table(*headers: str, right: Sequence[str] = ()) -> Table:
    """Returns an empty table; the columns named `right` hold figures."""
    table = Table(box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


def _compact(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, Mapping):
            return "  ".join(f"{name}={_compact(inner)}" for name, inner in value.items()) or "none"
        if isinstance(value, list | tuple):
            return "; ".join(_compact(inner) for inner in value) or "none"
        return str(value)
    return f"{value:,}"
