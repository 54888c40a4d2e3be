"""What training workers tell the driver while they train, how it is shown, and how they are asked to end."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.table import Table

from jobs.cluster.display import RATE_OVER_S, Rate, with_bar
from jobs.cluster.metrics import record_fault
from jobs.cluster.side_actor import SideActor
from smallcap.phrasing import describe_duration


@dataclass(frozen=True)
class TrainStep:
    """The newest step of a run."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # nats per token


class TrainWatch:
    """Knows the newest step, and whether the workers are asked to end; an actor on the driver's node.

    Args:
        run_id: With which restarts are counted in the metrics.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._newest: TrainStep | None = None
        self._asked, self._ended = False, False

    def note_step(self, step: TrainStep) -> bool:
        """Takes a step; returns whether the workers are to write a checkpoint and end."""
        if (
            self._newest is not None and step.step <= self._newest.step
        ):  # workers were lost, and go on from a checkpoint
            record_fault(self._run_id, None)
        self._newest = step
        return self._asked

    def newest(self) -> TrainStep | None:
        """Returns the newest step."""
        return self._newest

    def ask_to_end(self) -> None:
        """Asks the workers to write a checkpoint and end."""
        self._asked = True

    def note_end(self) -> None:
        """Says that the checkpoint is written."""
        self._ended = True

    def is_waited_for(self) -> bool:
        """Returns whether workers that train have not written their last checkpoint yet."""
        return self._newest is not None and not self._ended


class TrainView:
    """Shows training on a display.

    Args:
        watch: The actor of a `TrainWatch`.
        steps: The number of steps of the whole run.
    """

    def __init__(self, watch: SideActor, steps: int) -> None:
        self._watch, self._steps = watch, steps
        self._rate = Rate()
        self._newest: TrainStep | None = None
        self._began = time.monotonic()

    @property
    def is_under_way(self) -> bool:
        """Whether there was a step."""
        return self._newest is not None

    @property
    def progress(self) -> int:
        """The newest step."""
        return self._newest.step if self._newest else 0

    @property
    def is_short(self) -> bool:
        """Whether the workers have not begun."""
        return self._newest is None

    def render(self) -> Table:
        """Returns the line, with a bar."""
        line = self.line()  # which asks for the newest step
        return with_bar(line, self._newest.step if self._newest else 0, max(self._steps, 1))

    def line(self) -> str:
        """Returns the newest step, the rate and the time that is left."""
        self._newest = self._watch.ask("newest", timeout_s=3.0) or self._newest
        elapsed = time.monotonic() - self._began
        if self._newest is None:
            return f"Training: starting workers, which load the model; {describe_duration(elapsed)} so far"
        self._rate.add(elapsed, self._newest.step)
        return describe_step(self._newest, self._steps, self._rate)


def describe_step(newest: TrainStep, steps: int, rate: Rate) -> str:
    """Returns a step in words, with the rate and the time that is left as far as they are known."""
    now, left = rate.over(RATE_OVER_S), rate.time_left(steps - newest.step)
    per_s = "" if now is None else f" ({now:,.2f}/s)"
    described = f"step {newest.step:,} of {steps:,}{per_s}, epoch {newest.epoch}: loss {newest.loss:.4f}"
    return f"{described}; {left}" if left else described
