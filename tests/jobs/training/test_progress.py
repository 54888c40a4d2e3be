"""Training as people see it, from a watch in this process."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.cluster.display import Rate
from jobs.training.progress import TrainStep, TrainView, TrainWatch, describe_step
from tests.in_process_ray import LocalActor


def test_a_step_in_words() -> None:
    newest = TrainStep(1200, 2, 2.34567)
    assert describe_step(newest, 88_450, Rate()) == "step 1,200 of 88,450, epoch 2: loss 2.3457"
    rate = Rate()
    for second in range(10):
        rate.add(second, 1000 + 20 * second)
    line = describe_step(newest, 88_450, rate)
    assert line == "step 1,200 of 88,450 (20.00/s), epoch 2: loss 2.3457; about 1 h 12 min left"


def test_the_view_waits_for_the_first_step() -> None:
    watch = TrainWatch("run")
    view = TrainView(LocalActor(watch), 10)
    assert view.line() == "Training: starting workers, which load the model; 0 s so far"
    assert not view.is_under_way
    watch.note_step(TrainStep(3, 1, 1.5))
    assert view.line() == "step 3 of 10, epoch 1: loss 1.5000"
    assert view.is_under_way
    console = Console(file=io.StringIO(), width=100)
    console.print(view.render())
    assert "━" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("ended", [False, True])
def test_workers_that_train_are_waited_for_until_they_have_ended(ended: bool) -> None:
    watch = TrainWatch("run")
    watch.ask_to_end()
    assert not watch.is_waited_for()  # nobody has begun
    assert watch.note_step(TrainStep(1, 1, 1.0))
    if ended:
        watch.note_end()
    assert watch.is_waited_for() is not ended
