"""CIDEr, BLEU, ROUGE-L, METEOR and SPICE of captions against references: pycocoevalcap's figures, image by image.

The first three need no Java. pycocoevalcap's code computes them; this module holds the n-grams of one image at a time
and keeps each image's share of a figure for `bootstrap`. All metrics count the words of `ptb_tokenizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smallcap.errors import ConfigError
from smallcap.evaluation.bootstrap import Statistics, mean_statistics
from smallcap.evaluation.java_metrics import compute_meteor, score_meteor, score_spice, what_metric_lacks
from smallcap.evaluation.java_tools import pycocoevalcap_folder
from smallcap.evaluation.ptb_tokenizer import Tokenizer, tokenize_captions

BLEU_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
JAVA_FREE_METRICS = ("cider", *BLEU_METRICS, "rouge_l")
METRICS = (*JAVA_FREE_METRICS, "meteor", "spice")

_MAX_NGRAM = 4
_SMALL, _TINY = 1e-9, 1e-15  # in pycocoevalcap's BLEU, against divisions by zero


@dataclass(frozen=True)
class MetricScores:
    """The scores of a set of captions by one metric.

    Args:
        mean: The figure that papers report for the set. For BLEU and METEOR it is computed from counts summed over
            the set, and is not the mean of `per_image`.
        per_image: The score of each image.
        tokenizer: Tokenizer that split the captions into words.
        statistics: What `mean` is computed from, one row for each image in the order of `per_image`.
    """

    mean: float
    per_image: dict[str, float]
    tokenizer: Tokenizer
    statistics: Statistics


def score_captions(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = JAVA_FREE_METRICS,
) -> dict[str, MetricScores]:
    """Scores captions against their images' references, as pycocoevalcap does.

    CIDEr weighs n-grams by how many of these images have them in their references; with few images that says little.

    Args:
        candidates: A caption for each image.
        references: At least one caption for each of these images; other images in it are ignored.
        metrics: Names in `METRICS`.

    Returns:
        The scores by metric. CIDEr is on the scale of pycocoevalcap: 1.0 is what papers print as 100.

    Raises:
        ConfigError: pycocoevalcap is not installed; a metric is unknown or cannot run here; an image has no references.
        RunError: A Java program fails.
    """
    pycocoevalcap_folder()  # raises before anything is computed if it is missing
    _check_input(candidates, references, metrics)
    images = list(candidates)
    words, tokenizer = tokenize_captions([text for image in images for text in (candidates[image], *references[image])])
    scored = _Captions([], [])
    start = 0
    for image in images:
        end = start + 1 + len(references[image])
        scored.candidates.append(words[start])
        scored.references.append(words[start + 1 : end])
        start = end
    scores = {}
    for metric in metrics:
        per_image, statistics = _score(metric, scored)
        by_image = dict(zip(images, map(float, per_image), strict=True))
        scores[metric] = MetricScores(statistics.value, by_image, tokenizer, statistics)
    return scores


@dataclass(frozen=True)
class _Captions:
    """Tokenised captions and references, [images] each."""

    candidates: list[str]
    references: list[list[str]]

    @functools.cached_property
    def bleu_counts(self) -> np.ndarray:
        """The counts that `compute_bleu` takes for order 4, [images, 10]."""
        from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

        counts = np.empty((len(self.candidates), 2 * _MAX_NGRAM + 2))
        for row, candidate, references in zip(counts, self.candidates, self.references, strict=True):
            cooked = cook_test(candidate, cook_refs(references, n=_MAX_NGRAM), eff="closest", n=_MAX_NGRAM)
            row[:] = *cooked["correct"], *cooked["guess"], cooked["testlen"], cooked["reflen"]
        return counts


def _check_input(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], metrics: Sequence[str]
) -> None:
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise ConfigError("There is no such metric.", expected=", ".join(METRICS), found=", ".join(unknown))
    for metric in metrics:
        if lack := what_metric_lacks(metric):
            raise ConfigError("A metric cannot run here.", where=metric, found=lack)
    if not candidates:
        raise ConfigError("There are no captions to score.")
    if lacking := [image for image in candidates if not references.get(image)]:
        raise ConfigError(
            "Captions have no references.",
            expected="at least one reference for each image",
            found=f"{len(lacking)} of {len(candidates)} images without references, such as {lacking[0]}",
        )


def _score(metric: str, captions: _Captions) -> tuple[np.ndarray, Statistics]:
    """Returns each image's score, [images], and the statistics of the set's score."""
    if metric in BLEU_METRICS:
        return _bleu(captions, BLEU_METRICS.index(metric) + 1)
    if metric == "meteor":
        statistics = score_meteor(captions.candidates, captions.references)
        return compute_meteor(statistics.counts), statistics
    if metric == "spice":
        scores = score_spice(captions.candidates, captions.references)
    else:
        scores = {"cider": _cider, "rouge_l": _rouge_l}[metric](captions)
    return scores, mean_statistics(scores)


class _Counted:
    """A list whose entries are counted during iteration, so that only one image's n-grams are in memory."""

    def __init__(self, count: Callable[[Any], Any], entries: Sequence[Any]) -> None:
        self._count, self._entries = count, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Any]:
        return map(self._count, self._entries)


def _cider(captions: _Captions) -> np.ndarray:
    from pycocoevalcap.cider import cider_scorer

    scorer = cider_scorer.CiderScorer(n=_MAX_NGRAM, sigma=6.0)
    scorer.ctest = _Counted(cider_scorer.cook_test, captions.candidates)
    scorer.crefs = _Counted(cider_scorer.cook_refs, captions.references)
    _, scores = scorer.compute_score()
    return np.asarray(scores, np.float64)


def _rouge_l(captions: _Captions) -> np.ndarray:
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    pairs = zip(captions.candidates, captions.references, strict=True)
    return np.array([rouge.calc_score([candidate], references) for candidate, references in pairs])


def _bleu(captions: _Captions, order: int) -> tuple[np.ndarray, Statistics]:
    counts = captions.bleu_counts
    columns = [*range(order), *range(_MAX_NGRAM, _MAX_NGRAM + order), -2, -1]
    statistics = Statistics(counts[:, columns], compute_bleu)
    return compute_bleu(statistics.counts), statistics


def compute_bleu(counts: np.ndarray) -> np.ndarray:
    """Returns BLEU of n-gram counts.

    Args:
        counts: [..., 2 n + 2]: matching n-grams of orders 1 to n, n-grams of the candidate, its length, and that of the
            reference nearest in length.

    Source: pycocoevalcap/bleu/bleu_scorer.py (option "closest").
    """
    order = counts.shape[-1] // 2 - 1
    correct, guess = counts[..., :order], counts[..., order : 2 * order]
    length, reference_length = counts[..., -2], counts[..., -1]
    precision = np.prod((correct + _TINY) / (guess + _SMALL), axis=-1) ** (1 / order)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))
