"""Intervals by resampling: how often they hold the truth, and what pairing does."""

import numpy as np
import pytest

from smallcap.evaluation.bootstrap import Statistics, interval, mean_statistics, resample


def test_95_percent_intervals_hold_the_true_mean_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        statistics = mean_statistics(generator.exponential(size=100))  # of mean 1, and far from normal
        low, high = interval(resample({"mean": statistics}, 400, seed=trial)["mean"])
        held += low <= 1 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_a_figure_of_sums_is_resampled_as_a_whole() -> None:
    counts = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 8.0]])
    statistics = Statistics(counts, lambda sums: sums[..., 0] / sums[..., 1])
    assert statistics.value == pytest.approx(4 / 14)  # not the mean of 0.5, 0.75 and 0
    draws = resample({"ratio": statistics}, 2_000, seed=1)["ratio"]
    choices = np.array([[a, b, c] for a in range(3) for b in range(3) for c in range(3)])
    assert set(np.round(draws, 9)) == set(np.round(statistics.figure(counts[choices].sum(axis=1)), 9))


def test_images_without_a_value_are_left_out_of_a_mean() -> None:
    statistics = mean_statistics(np.array([1.0, np.nan, 3.0]))
    assert statistics.value == 2
    assert np.isnan(mean_statistics(np.array([np.nan])).value)
    nothing = resample({"none": mean_statistics(np.array([np.nan]))}, 10, seed=0)["none"]
    assert np.isnan(interval(nothing)).all()


def test_draws_are_shared_so_that_differences_are_paired() -> None:
    values = np.random.default_rng(0).normal(size=200)
    draws = resample({"a": mean_statistics(values), "b": mean_statistics(values + 0.1)}, 200, seed=0)
    assert draws["b"] - draws["a"] == pytest.approx(np.full(200, 0.1))


def test_the_seed_decides_the_draws() -> None:
    statistics = {"mean": mean_statistics(np.arange(20.0))}
    first, same, other = (resample(statistics, 50, seed)["mean"] for seed in (3, 3, 4))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
