"""Bounds are found where a score tells good captions from bad ones, and only there."""

import numpy as np
import pytest

from smallcap.evaluation.thresholds import find_threshold

RNG = np.random.default_rng(0)
IMAGES = [f"{number}.jpg" for number in range(2_000)]


def test_a_score_that_tells_bad_captions_has_a_bound_that_pays() -> None:
    quality = {image: float(number % 10 > 0) for number, image in enumerate(IMAGES)}  # a tenth is bad
    score = {image: 0.3 + 0.2 * good + 0.1 * RNG.random() for image, good in quality.items()}
    found = find_threshold(score, quality, "least", 0.8, 200, 0)
    assert found.bound == pytest.approx(0.5, abs=0.01)
    assert found.pays and found.quality == 1 and found.low < found.gain < found.high
    assert found.accepted == pytest.approx(0.9, abs=0.03)
    mirrored = find_threshold({image: -value for image, value in score.items()}, quality, "most", 0.8, 200, 0)
    assert (mirrored.bound, mirrored.gain) == (pytest.approx(-(found.bound or 0)), found.gain)


def test_a_bound_accepts_as_many_as_it_must_and_equal_scores_together() -> None:
    quality = {image: float(number % 2) for number, image in enumerate(IMAGES)}
    found = find_threshold(quality, quality, "least", 0.9, 50, 0)  # to accept 90% it must accept the bad ones too
    assert (found.bound, found.accepted, found.gain) == (None, 1.0, 0.0)
    assert not found.pays
    assert find_threshold(quality, quality, "least", 0.4, 50, 0).bound == 1


def test_a_score_that_tells_nothing_does_not_pay() -> None:
    quality = {image: RNG.random() for image in IMAGES}
    scores = [{image: RNG.random() for image in IMAGES} for _ in range(20)]
    found = [find_threshold(score, quality, "least", 0.5, 200, 0) for score in scores]
    assert sum(one.pays for one in found) <= 3


def test_images_without_the_score_are_rejected_below_a_least_one_only() -> None:
    quality = {image: float(number % 4 > 0) for number, image in enumerate(IMAGES)}
    score = {image: float("nan") if good == 0 else 0.5 for image, good in quality.items()}
    least, most = (find_threshold(score, quality, side, 0.5, 50, 0) for side in ("least", "most"))
    assert (least.bound, least.quality) == (0.5, 1)
    assert (most.bound, most.accepted) == (None, 1)
