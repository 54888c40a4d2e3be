"""Caption metrics against pycocoevalcap's own code, against values computed by hand, and without Java."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

from smallcap.errors import ConfigError
from smallcap.evaluation.bootstrap import Statistics, resample
from smallcap.evaluation.caption_metrics import (
    BLEU_METRICS,
    JAVA_FREE_METRICS,
    METRICS,
    MetricScores,
    compute_bleu,
    score_captions,
)
from smallcap.evaluation.java_metrics import what_metric_lacks
from tests.python_process import run_python

_NOUNS = ("dog", "man", "child", "car", "bird", "boat", "woman", "horse")
_PLACES = ("on the beach", "in the snow", "near a tree", "by the river", "on a street", "under the bridge")
_VERBS = ("runs", "stands", "is seen", "moves slowly")


def captions(count: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions of images with one to five references, tokenised already; a few captions have no or one word."""
    generator = random.Random(0)

    def caption() -> str:
        return f"a {generator.choice(_NOUNS)} {generator.choice(_VERBS)} {generator.choice(_PLACES)}"

    candidates = {f"{number}.jpg": caption() for number in range(count)}
    references = {image: [caption() for _ in range(generator.randint(1, 5))] for image in candidates}
    candidates |= {"0.jpg": "", "1.jpg": "dog", "2.jpg": references["2.jpg"][0]}
    return candidates, references


def of_pycocoevalcap(scorer: object, candidates: dict[str, str], references: dict[str, list[str]]) -> tuple:
    return scorer.compute_score(references, {image: [text] for image, text in candidates.items()})  # type: ignore[attr-defined]


def assert_equal(scores: MetricScores, mean: float, per_image: list[float]) -> None:
    assert scores.mean == pytest.approx(mean, abs=1e-12)
    assert list(scores.per_image.values()) == pytest.approx(list(per_image), abs=1e-12)


def test_cider_bleu_and_rouge_are_pycocoevalcaps() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = captions(80)
    scores = score_captions(candidates, references)
    more = references | {"other.jpg": ["a dog runs on the beach"]}  # of another image: it plays no part
    assert score_captions(candidates, more)["cider"].mean == scores["cider"].mean
    assert set(scores) == set(JAVA_FREE_METRICS)
    assert_equal(scores["cider"], *of_pycocoevalcap(Cider(), candidates, references))
    assert_equal(scores["rouge_l"], *of_pycocoevalcap(Rouge(), candidates, references))
    bleu = Bleu(4).compute_score(references, {image: [text] for image, text in candidates.items()}, verbose=0)
    for metric, mean, per_image in zip(BLEU_METRICS, *bleu, strict=True):
        assert_equal(scores[metric], mean, per_image)


def test_corpus_bleu_by_hand() -> None:
    candidates = {"a": "the cat the cat", "b": "a dog"}
    references = {"a": ["the cat sat"], "b": ["a dog ran far away", "dogs"]}
    scores = score_captions(candidates, references, ["bleu_1", "bleu_2"])
    # Matching words: the, cat (clipped to one each), a, dog: 4 of 6. Pairs: the cat, a dog: 2 of 4. The references that
    # are nearest in length have 3 and 1 words, 4 together, and the captions 6: no penalty for brevity.
    assert scores["bleu_1"].mean == pytest.approx(4 / 6)
    assert scores["bleu_2"].mean == pytest.approx(math.sqrt(4 / 6 * 2 / 4))
    assert scores["bleu_1"].per_image["b"] == pytest.approx(1)
    assert scores["bleu_1"].mean != pytest.approx(np.mean(list(scores["bleu_1"].per_image.values())))
    short = compute_bleu(np.array([2.0, 2.0, 2.0, 4.0]))  # all of 2 words right, where the reference has 4
    assert short == pytest.approx(math.exp(1 - 4 / 2))


def test_rouge_and_cider_by_hand() -> None:
    scores = score_captions({"a": "a red dog"}, {"a": ["a dog runs away"]}, ["rouge_l"])
    precision, recall = 2 / 3, 2 / 4
    assert scores["rouge_l"].mean == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))
    words = "abcdefghij"
    same = {word: f"{word}1 {word}2 {word}3 {word}4" for word in words}
    references = {word: [text] for word, text in same.items()}
    assert score_captions(same, references, ["cider"])["cider"].mean == pytest.approx(10)
    shifted = dict(zip(words, [*list(same.values())[1:], same["a"]], strict=True))
    assert score_captions(shifted, references, ["cider"])["cider"].mean == 0


def test_statistics_give_each_resampled_set_its_own_corpus_figure() -> None:
    candidates, references = captions(40)
    statistics = score_captions(candidates, references, ["bleu_4"])["bleu_4"].statistics
    draw = np.random.default_rng(5).integers(40, size=40)
    images = list(candidates)
    again = {str(place): candidates[images[image]] for place, image in enumerate(draw)}
    its_references = {str(place): references[images[image]] for place, image in enumerate(draw)}
    expected = score_captions(again, its_references, ["bleu_4"])["bleu_4"].mean
    assert resample({"bleu_4": statistics}, 1, seed=5)["bleu_4"][0] == pytest.approx(expected)
    assert isinstance(statistics, Statistics)


@pytest.mark.slow
def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    score_captions(*captions(5), metrics=[metric for metric in METRICS if not what_metric_lacks(metric)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("candidates", "references", "metrics", "message"),
    [
        ({}, {}, ["cider"], "no captions to score"),
        ({"a": "x"}, {"a": []}, ["cider"], "1 of 1 images without references, such as a"),
        ({"a": "x"}, {"a": ["x"]}, ["accuracy"], "expected: cider, bleu_1"),
    ],
)
def test_wrong_input_is_named(candidates: dict, references: dict, metrics: list, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        score_captions(candidates, references, metrics)
    assert message in str(error.value)


_WITHOUT_JAVA = """
from smallcap.evaluation.caption_metrics import score_captions
from smallcap.errors import ConfigError
scores = score_captions({"a": "A dog isn't here."}, {"a": ["A dog is here!"]})
print(sorted(scores), scores["rouge_l"].tokenizer, round(scores["bleu_1"].mean, 6))
for metric in ("meteor", "spice"):
    try:
        score_captions({"a": "x"}, {"a": ["x"]}, [metric])
    except ConfigError as error:
        print(str(error).splitlines()[1:])
"""


def test_without_java_the_other_metrics_run_and_these_say_why_not(tmp_path: Path) -> None:
    metrics, *refusals = run_python(_WITHOUT_JAVA, PATH=str(tmp_path)).splitlines()
    assert metrics == f"{sorted(JAVA_FREE_METRICS)} ptb-python 0.8"  # a dog is n't here: 4 of 5 words
    assert len(refusals) == 2
    assert all("no Java runs here; install a Java runtime" in refusal for refusal in refusals)
