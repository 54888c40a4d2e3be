"""Reports the measured claims: `claims.json`, the tables between the markers in README.md, and the plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

START, END = "<!-- claims: written by demo.claims -->", "<!-- end of claims -->"
DATASTORES = {
    "none": "no retrieval",
    "random": "captions drawn at random",
    "training_datastore": "the other domains'",
    "own_datastore": "their own",
    "own_datastore_half": "half of their own",
    "own_datastore_eighth": "an eighth of their own",
    "both": "both",
    "everything_and_noise": "both, and as much noise",
}
RETRIEVAL_COLUMNS = {
    "in_domain": "training domains",
    "in_domain_random": "… prompted at random",
    "transfer": "held-out domains",
    "transfer_noisy": "… half of the datastore noise",
    "transfer_random": "… prompted at random",
}
SIDES = {"in_domain": "training domains", "transfer": "held-out domains"}
COLOURS = {"in_domain": "#7f8fa6", "transfer": "#c0392b"}
Values = Mapping[str, Any]


def write_report(values: Values, folder: Path) -> None:
    """Writes the sections that have been measured; README.md must have the markers."""
    (folder / "claims.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    before, old_tables_and_after = readme.read_text(encoding="utf-8").split(START)
    after = old_tables_and_after.split(END)[1]
    readme.write_text(f"{before}{START}\n\n{tables(values)}\n\n{END}{after}", encoding="utf-8")
    _plot_datastores(values, folder / "claims-datastores.png")
    if "k" in values:
        _plot_lines(values["k"], "captions in the prompt (k)", folder / "claims-k.png")
    if "reduce_factor" in values:
        by_size = {row["trained_parameters"]: row for row in values["reduce_factor"].values()}
        _plot_lines(by_size, "trained parameters", folder / "claims-sizes.png", logarithmic=True)


def tables(values: Values) -> str:
    """Returns the tables in Markdown."""
    blocks = [
        f"CIDEr and, in brackets, the share of scenes whose caption names exactly their objects, with 95% intervals; "
        f"{values['scenes']:,} scenes of each side that no training saw.",
        _table(
            ["datastore", *SIDES.values()],
            [
                [label, *(_cell(values[side].get(_side_name(name, side))) for side in SIDES)]
                for name, label in DATASTORES.items()
            ],
        ),
    ]
    if "k" in values:
        rows = [[f"k = {k}", *(_cell(row[side]) for side in SIDES)] for k, row in values["k"].items()]
        blocks.append(_table(["own datastore", *SIDES.values()], rows))
    if "reduce_factor" in values:
        rows = [
            [factor, f"{row['trained_parameters']:,}", *(_cell(row[side]) for side in SIDES)]
            for factor, row in values["reduce_factor"].items()
        ]
        blocks.append(_table(["reduce factor", "trained parameters", *SIDES.values()], rows))
    if "retrieval" in values:
        rows = [[mode, *(_cell(row[name]) for name in RETRIEVAL_COLUMNS)] for mode, row in values["retrieval"].items()]
        blocks.append(_table(["trained with", *RETRIEVAL_COLUMNS.values()], rows))
    return "\n\n".join(blocks)


def _side_name(name: str, side: str) -> str:
    """Returns a row's name on a side: for the training domains, the other domains' datastore is the held-out one."""
    return "other_datastore" if side == "in_domain" and name == "training_datastore" else name


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _cell(row: Values | None) -> str:
    if row is None:
        return ""
    cider = f"{row['cider']:.2f} [{row['cider_low']:.2f}, {row['cider_high']:.2f}]"
    return f"{cider} ({row['accuracy']:.1%} [{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}])"


def _plot_datastores(values: Values, path: Path) -> None:
    names = [name for name in DATASTORES if name in values["transfer"]]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for offset, side in enumerate(SIDES):
        rows = [(place, values[side].get(_side_name(name, side))) for place, name in enumerate(names)]
        known = [(place, row) for place, row in rows if row is not None]
        axes.barh(
            [place + 0.38 * offset for place, _ in known],
            [row["cider"] for _, row in known],
            height=0.36,
            xerr=_errors([row for _, row in known]),
            color=COLOURS[side],
            label=SIDES[side],
        )
    axes.set_yticks([place + 0.19 for place in range(len(names))], [DATASTORES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("CIDEr, with 95% intervals")
    axes.set_ylabel("datastore")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    _save(figure, path)


def _plot_lines(rows: Mapping[Any, Values], label: str, path: Path, logarithmic: bool = False) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    places = [int(place) for place in rows]
    for side, name in SIDES.items():
        rows_of_side = [row[side] for row in rows.values()]
        axes.errorbar(
            places,
            [row["cider"] for row in rows_of_side],
            _errors(rows_of_side),
            marker="o",
            capsize=3,
            color=COLOURS[side],
            label=name,
        )
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("CIDEr, with 95% intervals")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, path)


def _errors(rows: Sequence[Values]) -> list[list[float]]:
    return [[row["cider"] - row["cider_low"] for row in rows], [row["cider_high"] - row["cider"] for row in rows]]


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
