import numpy as np
import pytest

from smallcap.index import ranking
from smallcap.index.ranking import NOTHING, best_of, exact_scores, merge_rankings, padded, settle


def test_the_order_is_by_score_then_id_and_nothing_comes_last() -> None:
    scores = np.array([[0.5, -np.inf, 0.9, 0.5, -0.2]], np.float32)
    ids = np.array([[7, NOTHING, 3, 2, 9]])
    assert best_of(scores, ids, 9)[1].tolist() == [[3, 2, 7, 9, NOTHING]]
    assert best_of(scores, ids, 2)[0].tolist() == [[np.float32(0.9), 0.5]]


def test_merging_is_the_ranking_of_everything() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (6, 40)).astype(np.float32)  # with many ties
    ids = np.stack([rng.permutation(40) for _ in range(6)])
    parts = [best_of(scores[:, some], ids[:, some], 8) for some in (slice(0, 3), slice(3, 25), slice(25, 40))]
    for merged, whole in zip(merge_rankings(parts, 8), best_of(scores, ids, 8), strict=True):
        np.testing.assert_array_equal(merged, whole)


def test_padding() -> None:
    scores, ids = padded(np.ones((2, 3), np.float32), np.ones((2, 3), np.int64), 5)
    assert scores[:, 3:].tolist() == [[-np.inf] * 2] * 2
    assert ids[:, 3:].tolist() == [[NOTHING] * 2] * 2
    assert padded(scores, ids, 2)[0].shape == (2, 2)


def test_exact_scores_are_the_same_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((50, 33), np.float32), rng.standard_normal((7, 33), np.float32)
    rows = rng.integers(-1, 50, (7, 11))
    together = exact_scores(queries, rows, vectors.__getitem__)
    assert (together[rows == NOTHING] == -np.inf).all()
    for row in range(7):
        alone = exact_scores(queries[row : row + 1], rows[row : row + 1], vectors.__getitem__)
        np.testing.assert_array_equal(alone[0], together[row])
    monkeypatch.setattr(ranking, "_VALUES_AT_ONCE", 100)
    np.testing.assert_array_equal(exact_scores(queries, rows, vectors.__getitem__), together)


@pytest.mark.parametrize("places", [1, 100, 1 << 20])
def test_settling_asks_again_only_for_what_is_uncertain(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query q is certain once 3 * q candidates have been fetched."""
    monkeypatch.setattr(ranking, "_PLACES_AT_ONCE", places)
    asked: dict[int, list[int]] = {}

    def attempt(rows: np.ndarray, fetch: int) -> ranking.Attempted:
        assert len(rows) <= max(1, places // fetch)
        asked.setdefault(fetch, []).extend(rows.tolist())
        settled = (fetch >= 3 * rows) | (fetch == 40)
        ids = np.tile(np.arange(fetch), (settled.sum(), 1))
        return settled, -ids.astype(np.float32), ids

    scores, ids = settle(20, 4, 6, 40, attempt)
    assert ids.tolist() == [[0, 1, 2, 3]] * 20
    assert scores.tolist() == [[0, -1, -2, -3]] * 20
    assert asked == {6: list(range(20)), 24: list(range(3, 20)), 40: list(range(9, 20))}
    assert settle(0, 4, 6, 40, attempt)[1].shape == (0, 4)
    assert settle(3, 0, 6, 40, attempt)[1].shape == (3, 0)
