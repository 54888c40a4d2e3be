"""Counts of values are exact up to a cell's width, and say the same of a run in whatever batches it comes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallcap.report.measures import CLIP_SCORE, LOGPROB, RUN_MEASURES, TOKENS, Distribution, histogram


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=200), st.integers(1, 50))
def test_quantiles_and_means_are_those_of_the_values(values: list[float], batch: int) -> None:
    distribution = Distribution(CLIP_SCORE)
    for start in range(0, len(values), batch):
        distribution.add(np.array(values[start : start + batch], np.float32))
    summary = distribution.summary()
    assert summary["count"] == len(values)
    assert summary["mean"] == pytest.approx(np.mean(values), abs=1e-6)
    for fraction in (0.05, 0.5, 0.95):
        nearest = np.quantile(values, fraction, method="inverted_cdf")
        assert distribution.quantile(fraction) == pytest.approx(nearest, abs=CLIP_SCORE.step * 1.01)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=300))
def test_every_value_is_in_a_bar(values: list[float]) -> None:
    distribution = Distribution(CLIP_SCORE)
    distribution.add(np.array(values))
    drawn = histogram([distribution])
    assert drawn is not None
    bars = drawn["runs"][0]["bars"]
    assert sum(bars) == len(values)
    assert 1 <= len(bars) <= 33
    assert drawn["start"] <= min(values) + 1e-6
    assert drawn["start"] + len(bars) * drawn["width"] >= max(values) - 1e-6


@pytest.mark.parametrize("measure", RUN_MEASURES, ids=lambda measure: measure.name)
def test_values_beyond_the_bounds_are_counted_there_and_others_not_at_all(measure: object) -> None:
    distribution = Distribution(measure)  # type: ignore[arg-type]
    distribution.add(np.array([-1e9, 1e9, np.nan, np.inf, -np.inf]))
    assert distribution.count == 2


def test_bars_have_round_bounds_and_are_the_same_for_two_runs() -> None:
    first, second = Distribution(TOKENS), Distribution(TOKENS)
    first.add(np.array([3] * 10 + [4] * 5))
    second.add(np.array([9]))
    drawn = histogram([first, second])
    assert drawn is not None
    assert (drawn["start"], drawn["width"]) == (3, 1)
    assert [run["bars"] for run in drawn["runs"]] == [[10, 5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    wide = Distribution(LOGPROB)
    wide.add(np.linspace(-83.3, -0.2, 5000))
    drawn = histogram([wide])
    assert drawn is not None
    assert (drawn["start"], drawn["width"], len(drawn["runs"][0]["bars"])) == (-85, 5, 17)


def test_without_values_there_is_neither_a_histogram_nor_a_quantile() -> None:
    assert histogram([Distribution(TOKENS), Distribution(TOKENS)]) is None
    assert Distribution(TOKENS).quantile(0.5) is None
    assert Distribution(TOKENS).summary()["mean"] is None
