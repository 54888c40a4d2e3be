"""The figures of one run, or of several on the same images, with confidence intervals.

This module decides what is measured, and over which images. `caption_metrics` scores, `bootstrap` resamples, and the
callers read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smallcap.errors import ConfigError
from smallcap.evaluation.bootstrap import Statistics, interval, mean_statistics, resample
from smallcap.evaluation.caption_metrics import BLEU_METRICS, METRICS, MetricScores, score_captions
from smallcap.evaluation.caption_words import Diversity, measure_diversity
from smallcap.evaluation.java_metrics import what_metric_lacks
from smallcap.evaluation.ptb_tokenizer import tokenize_in_python
from smallcap.evaluation.references import References
from smallcap.evaluation.run_captions import RunCaptions

# Fewer images make CIDEr's weights arbitrary: these are logarithms of how many images have an n-gram.
_FEW_IMAGES = 50
_CLIP_SCORE_WEIGHT = 2.5  # Hessel et al., CLIPScore (2021), section 3
_PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Figure:
    """A figure of a set of images with its 95% confidence interval; None if there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Lengths:
    """Percentiles of the captions' lengths, by percentage."""

    words: dict[str, float]
    tokens: dict[str, float]


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run.

    Args:
        figures: Figures by name, in the order of display.
        diversity: Diversity of its captions.
        lengths: Lengths of its captions.
        differences: Its figures minus the first run's, with paired intervals; empty for the first.
    """

    figures: dict[str, Figure]
    diversity: Diversity
    lengths: Lengths
    differences: dict[str, Figure]


@dataclass(frozen=True)
class Evaluation:
    """The figures of one run or several.

    Args:
        images: Number of evaluated images: those with references that every run has captioned.
        captions_per_image: Mean number of references per image.
        tokenizer: Tokenizer of the caption metrics; None if none of them ran.
        runs: Figures of each run, in the order given.
        unavailable: Reasons why metrics did not run, by metric.
        warnings: What a reader of the figures should know.
    """

    images: int
    captions_per_image: float
    tokenizer: str | None
    runs: tuple[RunFigures, ...]
    unavailable: dict[str, str]
    warnings: tuple[str, ...]


def evaluate_runs(
    runs: Sequence[RunCaptions],
    references: References,
    metrics: Sequence[str] = METRICS,
    resamples: int = 1000,
    seed: int = 0,
    datastore: Iterable[Sequence[str]] | None = None,
) -> Evaluation:
    """Measures one run, or several on the images that all have.

    Args:
        runs: The runs; the others are compared with the first.
        references: References of the images.
        metrics: Names in `METRICS`; those that cannot run here are left out and named.
        resamples: Draws of the bootstrap; 0 gives no intervals.
        seed: Seed of the draws.
        datastore: All texts of the datastore, in batches; captions in it are not novel.

    Raises:
        ConfigError: There are no images to evaluate, or pycocoevalcap is not installed.
        RunError: A Java program fails.
    """
    images = [image for image in runs[0].captions if all(image in run.captions for run in runs)]
    if not images:
        raise ConfigError(
            "No captioned image has references.",
            where=references.where,
            expected="images named " + ", ".join(list(references.captions)[:3]),
            found=", ".join(example for run in runs for example in run.examples[:3]) or "no captions",
            remedy="Give references of these images, or caption with the references' file names or ids as image ids.",
        )
    unavailable = {metric: lack for metric in metrics if (lack := what_metric_lacks(metric))}
    running = [metric for metric in metrics if metric not in unavailable]
    stored = _stored_captions(datastore, runs, images)
    scored = [_score(run, references, images, running) for run in runs]
    statistics = [
        {name: entry.statistics for name, entry in scores.items()} | _run_statistics(run, images, stored)
        for run, scores in zip(runs, scored, strict=True)
    ]
    figures = _with_intervals(statistics, resamples, seed)
    return Evaluation(
        images=len(images),
        captions_per_image=float(np.mean([len(references.captions[image]) for image in images])),
        tokenizer=next((entry.tokenizer for scores in scored for entry in scores.values()), None),
        runs=tuple(_run_figures(run, images, *of_run) for run, of_run in zip(runs, figures, strict=True)),
        unavailable=unavailable,
        warnings=_warnings(len(images), running),
    )


def _score(
    run: RunCaptions, references: References, images: Sequence[str], metrics: Sequence[str]
) -> dict[str, MetricScores]:
    if not metrics:
        return {}
    return score_captions({image: run.captions[image] for image in images}, references.captions, metrics)


def _run_statistics(run: RunCaptions, images: Sequence[str], stored: set[str] | None) -> dict[str, Statistics]:
    """Returns the figures that need no scorer."""
    cosine, copied = run.column("clip_cosine", images), run.column("copied", images)
    values = {
        "clip_score": _CLIP_SCORE_WEIGHT * np.maximum(cosine, 0),  # NaN stays NaN
        "clip_cosine": cosine,
        "retrieval_recall": run.column("retrieval_recall", images),
        "copied_share": run.column("copied_share", images),
        "copied": copied,
        "novel": 1 - copied,
        "words": run.column("words", images),
        "tokens": run.column("tokens", images),
    }
    if stored is not None:
        known = np.array([tokenize_in_python(run.captions[image]) in stored for image in images])
        values["novel"] = 1 - np.fmax(copied, known)  # without retrieval only the datastore counts
    return {name: mean_statistics(column) for name, column in values.items()}


def _stored_captions(
    datastore: Iterable[Sequence[str]] | None, runs: Sequence[RunCaptions], images: Sequence[str]
) -> set[str] | None:
    """Returns the captions, as words, that the datastore holds; None if it was not given."""
    if datastore is None:
        return None
    wanted = {tokenize_in_python(run.captions[image]) for run in runs for image in images}
    return {words for texts in datastore for words in map(tokenize_in_python, texts) if words in wanted}


def _with_intervals(
    statistics: Sequence[Mapping[str, Statistics]], resamples: int, seed: int
) -> list[tuple[dict[str, Figure], dict[str, Figure]]]:
    """Returns each run's figures, and these minus the first run's, which has no such differences itself."""
    named = {(run, name): entry for run, by_name in enumerate(statistics) for name, entry in by_name.items()}
    values = {key: entry.value for key, entry in named.items()}
    draws = resample(named, resamples, seed) if resamples else {}

    def difference(run: int, name: str) -> Figure:
        drawn = draws[run, name] - draws[0, name] if draws else None
        return _figure(values[run, name] - values[0, name], drawn)

    return [
        (
            {name: _figure(values[run, name], draws.get((run, name))) for name in by_name},
            {name: difference(run, name) for name in by_name} if run else {},
        )
        for run, by_name in enumerate(statistics)
    ]


def _figure(value: float, draws: np.ndarray | None) -> Figure:
    if np.isnan(value):
        return Figure(None)
    return Figure(value) if draws is None else Figure(value, *interval(draws))


def _run_figures(
    run: RunCaptions, images: Sequence[str], figures: dict[str, Figure], differences: dict[str, Figure]
) -> RunFigures:
    lengths = Lengths(*(_percentiles(run.column(name, images)) for name in ("words", "tokens")))
    return RunFigures(figures, measure_diversity(run.captions[image] for image in images), lengths, differences)


def _percentiles(lengths: np.ndarray) -> dict[str, float]:
    known = lengths[~np.isnan(lengths)]
    if not len(known):
        return {}
    return {f"p{percent}": float(np.percentile(known, percent)) for percent in _PERCENTILES}


def _warnings(images: int, metrics: Sequence[str]) -> tuple[str, ...]:
    if images >= _FEW_IMAGES or "cider" not in metrics:
        return ()
    return (
        f"CIDEr weighs n-grams by how many images have them in their references. With fewer than {_FEW_IMAGES} images "
        f"(here {images}) its value says little.",
    )


def expand_metrics(names: Iterable[str]) -> list[str]:
    """Returns the metrics that names stand for, in the order of `METRICS`; `bleu` stands for all four orders."""
    wanted = {metric for name in names for metric in (BLEU_METRICS if name == "bleu" else (name,))}
    return [metric for metric in METRICS if metric in wanted]
