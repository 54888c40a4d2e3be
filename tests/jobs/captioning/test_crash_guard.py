"""The guard finds the image that kills its process."""

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.captioning.crash_guard import READ_IN_VAIN, CrashGuard, CrashGuardClient, DecodeClock
from jobs.cluster.side_actor import run_side_actor
from tests.in_process_ray import LocalActor


def test_the_image_that_kills_its_process_is_found_at_the_fourth_attempt() -> None:
    guard = CrashGuard()
    client = CrashGuardClient(LocalActor(guard))
    tried: list[list[int]] = []

    def decode(rows: list[int]) -> list[str]:
        tried.append(rows)
        if 5 in rows:
            raise KeyboardInterrupt  # the process ends: nothing after it happens
        return [f"image {row}" for row in rows]

    rows = list(range(8))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            client.run_guarded(2, rows, decode)
    assert tried == [rows, rows, [0], [1], [2], [3], [4], [5]]
    assert client.run_guarded(2, rows, decode) == [None if row == 5 else f"image {row}" for row in rows]
    assert guard.begin(2, [5]) == [5]
    # Repeated because its result was lost: the image is not tried again, and its neighbours are one batch.
    tried.clear()
    assert client.run_guarded(2, rows, decode)[5] is None
    assert all(5 not in batch for batch in tried)
    assert client.run_guarded(3, rows[:5], decode) == [f"image {row}" for row in range(5)]


def test_a_batch_that_is_lost_with_its_node_has_no_culprit() -> None:
    guard = CrashGuard()
    assert guard.begin(0, [0, 1]) == []
    assert guard.begin(0, [0, 1]) == []
    assert guard.is_suspicious(0, [0, 1])
    assert guard.begin(0, [0]) == []
    guard.clear(0, [0])
    assert guard.begin(0, [1]) == []
    guard.clear(0, [1])
    assert not guard.is_suspicious(0, [0, 1])
    assert guard.begin(0, [0, 1]) == []


def test_a_batch_of_one_may_die_once() -> None:
    guard = CrashGuard()
    assert guard.begin(0, [3]) == []
    assert guard.begin(0, [3]) == []
    assert guard.begin(0, [3]) == [3]
    guard.clear(0, [3])
    assert guard.begin(0, [3]) == [3]


def test_an_image_that_is_given_up_is_left_out_and_no_other() -> None:
    guard = CrashGuard()
    client = CrashGuardClient(LocalActor(guard))
    assert guard.begin(0, [3, 4]) == []
    client.give_up(0, 3)
    assert client.run_guarded(0, [3, 4], lambda rows: [str(row) for row in rows]) == [None, "4"]
    assert client.too_slow(0, [3, 4]) == [3]
    assert client.too_slow(1, [3]) == []


def test_a_clock_ends_a_process_that_one_image_keeps_busy() -> None:
    given_up: list[int] = []
    ended = threading.Event()
    with DecodeClock(given_up.append, limit_s=0.05, look_every_s=0.01, end=ended.set) as clock:
        clock.begin(7)
        while not ended.is_set():
            sum(range(1000))
    assert given_up == [7]
    with DecodeClock(given_up.append, limit_s=0.0, look_every_s=0.001, end=ended.set) as clock:
        clock.begin(None)
        sum(range(1_000_000))  # no image's
    assert given_up == [7]


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 20), unique=True)), max_size=30))
def test_what_is_cleared_takes_no_memory(batches: list[tuple[int, list[int]]]) -> None:
    guard = CrashGuard()
    for fragment, rows in batches:
        assert guard.begin(fragment, rows) == []
        guard.clear(fragment, rows)
    assert not guard._begun
    assert not guard._alone


@pytest.mark.ray
def test_an_image_without_end_costs_one_more_attempt() -> None:
    import ray

    with run_side_actor(CrashGuard) as actor:
        client = CrashGuardClient(actor)

        def decode(rows: list[int]) -> list[str]:
            with DecodeClock(lambda row: client.give_up(2, row), limit_s=0.5, look_every_s=0.1) as clock:
                for row in rows:
                    clock.begin(row)
                    while row == 5:
                        pass
            return [f"image {row}" for row in rows]

        task = ray.remote(max_retries=1)(lambda: client.run_guarded(2, list(range(8)), decode))
        expected = [None if row == 5 else f"image {row}" for row in range(8)]
        assert ray.get(task.remote(), timeout=120) == expected
        assert client.too_slow(2, list(range(8))) == [5]


@pytest.mark.ray
def test_an_image_that_kills_its_task_costs_four_attempts_and_no_other_image() -> None:
    import ray

    def decode(rows: list[int]) -> list[str]:
        if 5 in rows:
            os._exit(1)
        return [f"image {row}" for row in rows]

    with run_side_actor(CrashGuard) as actor:
        client = CrashGuardClient(actor)
        task = ray.remote(max_retries=-1)(lambda: client.run_guarded(2, list(range(8)), decode))
        expected = [None if row == 5 else f"image {row}" for row in range(8)]
        assert ray.get(task.remote(), timeout=120) == expected
        assert actor.ask("begin", 2, list(range(8))) == [5]


def test_reading_that_kills_its_process_ends_at_last_and_marks_no_image() -> None:
    guard = CrashGuard()
    client = CrashGuardClient(LocalActor(guard))
    for _ in range(READ_IN_VAIN):
        assert not client.begin_reading(4, 0)
        client.end_reading(4, 0)
        assert not client.begin_reading(4, 1)  # and here the process dies
    assert not client.begin_reading(4, 0)
    client.end_reading(4, 0)
    assert client.begin_reading(4, 1)
    assert not client.begin_reading(5, 1)
    assert guard.begin(4, [0, 1]) == []
