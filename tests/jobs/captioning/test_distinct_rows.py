"""Rows that come again count once, in whatever pieces and order, and what is whole costs nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jobs.captioning.distinct_rows import DistinctRows, ranges_of
from jobs.captioning.monitor import RunMonitor
from jobs.captioning.stage_report import StageReport


def test_the_rows_of_a_batch_by_fragment() -> None:
    fragments, rows = np.array([7, 3, 7, 7, 3]), np.array([2, 9, 1, 5, 8])
    assert ranges_of(fragments, rows) == ((3, ((8, 10),)), (7, ((1, 3), (5, 6))))


batches = st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(0, 300), min_size=1, unique=True)), max_size=12)


@given(batches=batches, ends=st.sets(st.integers(0, 20)))
def test_each_row_counts_once_in_each_stage(batches: list[tuple[int, list[int]]], ends: set[int]) -> None:
    distinct = DistinctRows()
    loaded: set[tuple[int, int]] = set()
    captioned: set[tuple[int, int]] = set()
    for number, rows in [*batches, *batches]:
        ranges = ranges_of(np.full(len(rows), number), np.array(rows))
        if number not in ends:  # such a fragment's end comes below
            new = {(number, row) for row in rows} - loaded
            loaded |= new
            assert distinct.add_loaded(ranges, ends=False) == len(new)
            new = {(number, row) for row in rows} - captioned
            captioned |= new
            assert distinct.add_captioned(ranges) == len(new)
    for number in ends:
        every = ((number, ((0, 301),)),)
        assert distinct.add_loaded(every, ends=True) == 301
        assert distinct.add_loaded(((number, ((0, 9),)),), ends=False) == 0
        assert distinct.add_captioned(((number, ((0, 300),)),)) == 300
        assert distinct.add_captioned(every) == 1
        assert distinct.add_captioned(every) == 0
    assert not ends & distinct._loaded._bits.keys()
    assert not ends & distinct._captioned._bits.keys()
    assert not distinct._ended


def test_captions_that_are_reported_before_the_end_of_loading() -> None:
    distinct, rows = DistinctRows(), ((5, ((0, 40),)),)
    assert distinct.add_captioned(rows) == 40
    assert distinct.add_loaded(rows, ends=True) == 40
    assert distinct.add_captioned(rows) == 0
    assert not distinct._captioned._bits


def test_what_was_lost_with_a_node_counts_once_and_its_time_twice() -> None:
    monitor = RunMonitor(images=512)
    batch = ((0, ((0, 256),)),)
    for _ in range(3):
        monitor.report(StageReport("load", 256, 2.0, rows=batch, ended_fragments=1, ended_images=256))
        monitor.report(StageReport("caption", 256, 5.0, rows=batch))
    snapshot = monitor.snapshot()
    assert (snapshot.load.images, snapshot.caption.images) == (256, 256)
    assert (snapshot.load.seconds, snapshot.caption.seconds) == (6.0, 15.0)
    assert snapshot.timeline is not None
    assert sum(snapshot.timeline.load) == 256
