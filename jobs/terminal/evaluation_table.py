"""Prints an evaluation as a table in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import ascii_uppercase
from typing import Any

from rich.table import Table
from rich.text import Text

from jobs.terminal.console import cell, out
from smallcap.phrasing import describe_count, describe_counts, one_line

_UNSCALED = ("clip_score", "clip_cosine", "words", "tokens")  # other figures are shown times 100, as in papers
_NAMES = {
    "cider": "CIDEr",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "spice": "SPICE",
    "clip_score": "CLIPScore",
    "clip_cosine": "CLIP cosine",
    "retrieval_recall": "retrieval recall, %",
    "copied_share": "sequences copied, %",
    "copied": "copied from a neighbour, %",
    "novel": "novel, %",
    "words": "words",
    "tokens": "tokens",
}


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Prints the result of `jobs.evaluate.run`: figures with their intervals, what was left out, and warnings."""
    runs = result["runs"]
    for number, run in enumerate(runs, start=1):
        out.print(cell(f"{_label(number, len(runs))}: {run['run']}", "cyan"), soft_wrap=True)
        out.print(cell(f"  {_counts(run, result)}"), soft_wrap=True)
    out.print()
    out.print(_figures(result))
    images = describe_count(result["images"], "image")
    out.print(f"{images}, {result['captions_per_image']:.1f} references each; {_method(result)}")
    for metric, reason in result["unavailable"].items():
        out.print(cell(f"{_NAMES[metric]} did not run. {one_line(reason)}", "yellow"), soft_wrap=True)
    for warning in result["warnings"]:
        out.print(cell(warning, "yellow"), soft_wrap=True)


def _figures(result: Mapping[str, Any]) -> Table:
    runs = result["runs"]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for number in range(1, len(runs) + 1):
        table.add_column(_label(number, len(runs)), justify="right")
    if len(runs) == 2:
        table.add_column("B − A", justify="right")
    for name in runs[0]["figures"]:
        if len(runs) == 1:
            table.add_row(_NAMES[name], Text(_cell(name, runs[0]["figures"][name])))
            continue
        shown = [Text(_shown(name, run["figures"][name]["value"])) for run in runs]
        if len(runs) == 2:
            shown.append(_difference(name, runs[1]["differences"][name]))
        else:
            for text, run in zip(shown[1:], runs[1:], strict=True):
                text.append(f" ({_shown(name, run['differences'][name]['value'], sign='+')})")
                text.stylize("bold" if _is_significant(run["differences"][name]) else "")
        table.add_row(_NAMES[name], *shown)
    for name, show in _DETAILS.items():
        table.add_row(name, *(show(run) for run in runs))
    return table


_DETAILS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "distinct-1, distinct-2": lambda run: f"{run['diversity']['distinct_1']:.3f}, {run['diversity']['distinct_2']:.3f}",
    "vocabulary": lambda run: f"{run['diversity']['vocabulary']:,}",
    "words, 5% to 95%": lambda run: _range(run["lengths"]["words"]),
    "tokens, 5% to 95%": lambda run: _range(run["lengths"]["tokens"]),
}


def _range(percentiles: Mapping[str, float]) -> str:
    return f"{percentiles['p5']:.0f} to {percentiles['p95']:.0f}" if percentiles else "–"


def _cell(name: str, figure: Mapping[str, float | None]) -> str:
    value, low, high = (_shown(name, figure[bound]) for bound in ("value", "low", "high"))
    return value if figure["low"] is None else f"{value} [{low}, {high}]"


def _difference(name: str, figure: Mapping[str, float | None]) -> Text:
    """Returns a difference as text, in bold where its interval excludes 0."""
    return Text(_cell(name, figure), style="bold" if _is_significant(figure) else "")


def _is_significant(figure: Mapping[str, float | None]) -> bool:
    low, high = figure["low"], figure["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _shown(name: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    scaled, digits = (value, 3) if name in _UNSCALED else (100 * value, 1)
    return f"{round(scaled, digits) + 0.0:{sign}.{digits}f}"  # + 0.0 makes -0.0 a plain 0


def _label(number: int, runs: int) -> str:
    letters = ascii_uppercase if runs <= len(ascii_uppercase) else ""
    return (letters[number - 1] if letters else str(number)) if runs > 1 else "run"


def _counts(run: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Says how many rows were evaluated, failed or lack references, and how many reference images lack a caption."""
    errors = describe_counts(run["errors"])
    examples = f" (such as {run['without_references_examples'][0]})" if run["without_references"] else ""
    evaluated = result["images"] + run["only_in_this_run"]
    counts = [
        describe_count(run["rows"], "row"),
        f"{sum(run['errors'].values()):,} failed" + (f" ({errors})" if errors else ""),
        f"{run['without_references']:,} without references{examples}",
        f"{describe_count(result['references']['images'] - evaluated, 'reference image')} without a caption",
    ]
    if len(result["runs"]) > 1:
        others = "the other run lacks" if len(result["runs"]) == 2 else "other runs lack"
        counts.append(f"{run['only_in_this_run']:,} that {others}")
    return "; ".join(counts)


def _method(result: Mapping[str, Any]) -> str:
    options = result["options"]
    words = f"words by {result['tokenizer']}" if result["tokenizer"] else "no caption metrics"
    if not options["bootstrap"]:
        return f"{words}; no intervals."
    paired = ", paired" if len(result["runs"]) > 1 else ""
    if len(result["runs"]) > 2:
        paired = ", paired; in brackets the difference to the first, in bold where its interval leaves 0 out"
    return f"{words}; 95% intervals from {options['bootstrap']:,} bootstrap draws{paired}, seed {options['seed']}."
