"""METEOR and SPICE, the caption metrics that exist only as Java programs."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Sequence

import numpy as np

from smallcap.errors import RunError
from smallcap.evaluation.bootstrap import Statistics
from smallcap.evaluation.java_tools import has_java, pycocoevalcap_folder, run_java

# METEOR 1.5's parameters for English, and the weights of exact, stem, synonym and paraphrase matches.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_STATISTICS = 23  # numbers that the program prints per caption
_CORENLP = "stanford-corenlp-3.6.0"
_GET_CORENLP = (
    'python -c "from pycocoevalcap.spice.get_stanford_models import get_stanford_models; get_stanford_models()"'
)


def what_metric_lacks(metric: str) -> str:
    """Says what a metric lacks to run here, with the remedy; empty if it can run."""
    if metric not in ("meteor", "spice"):
        return ""
    if not has_java():
        return "It is a Java program, and no Java runs here; install a Java runtime and put `java` on the PATH."
    folder = pycocoevalcap_folder() / "spice" / "lib"
    if metric == "spice" and not all((folder / f"{_CORENLP}{end}.jar").exists() for end in ("", "-models")):
        return f"It needs Stanford CoreNLP 3.6.0, which pycocoevalcap does not bring; fetch it with: {_GET_CORENLP}"
    return ""


def score_meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """Scores tokenised captions with METEOR.

    Args:
        candidates: Captions, [images].
        references: At least one reference for each image.

    Raises:
        RunError: The program fails.

    Source: pycocoevalcap/meteor/meteor.py, which has the program compute the figure as well.
    """
    jar = pycocoevalcap_folder() / "meteor" / "meteor-1.5.jar"
    lines = [" ||| ".join(("SCORE", *refs, text)) for text, refs in zip(candidates, references, strict=True)]
    options = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    rows = [line.split() for line in run_java(options, "\n".join(lines) + "\n", "METEOR").splitlines()]
    if len(rows) != len(lines) or any(len(row) != _STATISTICS for row in rows):
        raise RunError(
            "METEOR did not return statistics.",
            where=str(jar),
            expected=f"{len(lines)} lines of {_STATISTICS} numbers",
            found=f"{len(rows)} lines of {sorted({len(row) for row in rows})} numbers",
        )
    return Statistics(_meteor_counts(np.array(rows, np.float64)), compute_meteor)


def _meteor_counts(numbers: np.ndarray) -> np.ndarray:
    """Weighs the program's numbers, [images, 23], into [images, 7], whose sums give the figure of a set."""
    lengths, function_words = numbers[:, 0:2], numbers[:, 2:4]  # [images, caption or reference]
    # [images, kind of match, content or function, caption or reference]
    matches = numbers[:, 4:20].reshape(-1, 4, 2, 2)
    word_weights = np.array([_DELTA, 1 - _DELTA])
    weighted_matches = np.einsum("imws,m,w->is", matches, _MATCH_WEIGHTS, word_weights)
    weighted_lengths = _DELTA * (lengths - function_words) + (1 - _DELTA) * function_words
    chunks, matched_words = numbers[:, 20].copy(), numbers[:, 21:23]
    chunks[(matched_words == lengths).all(axis=1) & (chunks == 1)] = 0  # nothing is out of order
    return np.concatenate([weighted_matches, weighted_lengths, matched_words, chunks[:, None]], axis=1)


def compute_meteor(counts: np.ndarray) -> np.ndarray:
    """Returns METEOR of summed counts.

    Args:
        counts: [..., 7]: weighted matches of captions and of references, their weighted lengths, their matched words,
            and the chunks that these form.

    Source: Denkowski and Lavie, Meteor Universal (2014), section 2; the class MeteorScorer of METEOR 1.5.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing matches: 0
        precision, recall = counts[..., 0] / counts[..., 2], counts[..., 1] / counts[..., 3]
        mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragmentation = counts[..., 6] / ((counts[..., 4] + counts[..., 5]) / 2)
        return np.nan_to_num(mean * (1 - _GAMMA * fragmentation**_BETA))


def score_spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Scores tokenised captions with SPICE.

    Args:
        candidates: Captions, [images].
        references: At least one reference for each image.

    Returns:
        [images] float64; NaN if SPICE gives no score.

    Raises:
        RunError: The program fails.
    """
    from pycocoevalcap.spice.spice import Spice

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, scores = Spice().compute_score(
                {image: list(texts) for image, texts in enumerate(references)},
                {image: [text] for image, text in enumerate(candidates)},
            )
    except (subprocess.CalledProcessError, OSError) as error:
        raise RunError(
            "SPICE ended with an error.",
            where=str(pycocoevalcap_folder() / "spice"),
            found=str(error),
            remedy="Give it Java 8, 8 GB of memory and a writable folder, or leave SPICE out.",
        ) from error
    return np.array([entry["All"]["f"] for entry in scores], np.float64)
