from concurrent.futures import ThreadPoolExecutor

import faiss
import pytest

from smallcap.errors import ConfigError
from smallcap.index.manifest import ShardEntry, share_of
from tests.index_files import OpenIndex, unit_vectors


def shards_of(*rows: int) -> list[ShardEntry]:
    firsts = [sum(rows[:number]) for number in range(len(rows))]
    return [
        ShardEntry(file="files/x", bytes=1, sha256="0" * 64, rows=count, first_id=first)
        for count, first in zip(rows, firsts, strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [
        ([5], 1, [1]),
        ([5, 5, 5, 5, 5, 5, 5], 3, [2, 3, 2]),
        ([100, 1, 1, 1], 4, [1, 1, 1, 1]),
        ([1, 1, 1, 100], 2, [3, 1]),
        ([100, 1, 1, 1], 2, [1, 3]),
        ([100, 1, 1, 1], 3, [1, 1, 2]),
        ([30, 10, 10, 10], 2, [1, 3]),
    ],
)
def test_shares_are_contiguous_not_empty_and_about_equal(rows: list[int], count: int, expected: list[int]) -> None:
    shards = shards_of(*rows)
    shares = [share_of(shards, (number, count)) for number in range(count)]
    assert [shard for share in shares for shard in share] == shards
    assert [len(share) for share in shares] == expected


def test_more_shares_than_shards() -> None:
    with pytest.raises(ConfigError, match=r"fewer shards(.|\n)*at most 2(.|\n)*found: 3"):
        share_of(shards_of(1, 1), (0, 3))


def test_a_search_has_its_threads_in_whichever_thread_it_runs(open_index: OpenIndex) -> None:
    """OpenMP keeps the number for each thread, and a captioner prepares batches in another than loads it."""
    retriever = open_index(unit_vectors(50))
    retriever.use_threads(3)

    def search() -> int:
        retriever.search(unit_vectors(2, seed=1), 4)
        return faiss.omp_get_max_threads()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(search).result() == 3
