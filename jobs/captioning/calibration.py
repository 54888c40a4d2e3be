"""Times how a captioning run loads and captions, on a few of its images, for an estimate of the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import pyarrow as pa

from smallcap.machine.actor_plan import ActorPlan
from smallcap.machine.process_memory import private_bytes

_TIMED_ROUNDS = 3  # of calls at the same time, after one that warms up, in which a GPU's steps are recorded


@dataclass(frozen=True)
class Calibration:
    """Measurements of a few batches."""

    images: int  # how many were captioned in the time
    load_s: float  # per image, on one CPU
    caption_s: float  # per image, in one actor
    start_s: float  # the actor's time to load its models and for its first call
    actor_bytes: int  # the actor's private memory, without the shared pages of the index
    gpu_bytes: int = 0  # the most GPU memory that the actor took


def calibrate(
    load: Callable[[], Iterable[pa.Table]],
    make_captioner: Callable[[], Callable[[pa.Table], Any]],
    plan: ActorPlan,
    rows: int,
    at_once: int,
) -> Calibration:
    """Loads a few batches in a CPU task and captions them in an actor with the plan's resources; connect to Ray first.

    Both are timed as the run does them, and without what happens only once: the first batch that is loaded, if there
    are others, and the captioner's first calls.

    Args:
        load: A picklable function that yields tables as the run's loading tasks make them.
        make_captioner: A picklable function that loads the actor's captioner, which takes such tables.
        plan: The run's actors.
        rows: How many images a call of the captioner takes. They are taken again and again from those that are loaded.
        at_once: How many calls go on in the actor at the same time.

    Raises:
        SmallCapError: Loading or captioning failed; Ray's error is around it, see `unwrapped_errors`.
    """
    import ray

    loading = ray.remote(num_cpus=plan.cpus_per_task)(_time_loading).remote(load)
    actor = ray.remote(_CalibratingActor).options(num_cpus=plan.cpus_per_actor, num_gpus=plan.gpus_per_actor).remote()
    try:
        images, load_s = ray.get(loading)
        calibration: Calibration = ray.get(actor.measure.remote(make_captioner, images, (rows, at_once), load_s))
        return calibration
    finally:
        ray.kill(actor)


def _time_loading(load: Callable[[], Iterable[pa.Table]]) -> tuple[pa.Table, float]:
    """Returns all images, and the seconds per image."""
    batches, ends = [], [time.perf_counter()]
    for batch in load():
        batches.append(batch)
        ends.append(time.perf_counter())
    counted = slice(1, None) if len(batches) > 1 else slice(None)
    seconds = [end - start for start, end in pairwise(ends)]
    return pa.concat_tables(batches), sum(seconds[counted]) / sum(map(len, batches[counted]))


class _CalibratingActor:
    def measure(
        self,
        make_captioner: Callable[[], Callable[[pa.Table], Any]],
        images: pa.Table,
        call: tuple[int, int],
        load_s: float,
    ) -> Calibration:
        """Captions images, `call` at a time (rows, and calls at once), and measures the time and memory."""
        begun = time.perf_counter()
        rows, at_once = call
        captioner = make_captioner()
        numbers = iter(range(at_once * (1 + _TIMED_ROUNDS)))
        with ThreadPoolExecutor(at_once) as threads:

            def caption(rounds: int) -> float:
                calls = [_rows_of_call(images, rows, number) for number in islice(numbers, at_once * rounds)]
                started = time.perf_counter()
                for _ in threads.map(captioner, calls):
                    pass
                return time.perf_counter() - started

            caption(rounds=1)
            start_s = time.perf_counter() - begun
            caption_s = caption(_TIMED_ROUNDS)
        timed = rows * at_once * _TIMED_ROUNDS
        return Calibration(timed, load_s, caption_s / timed, start_s, private_bytes(), _gpu_bytes())


def _rows_of_call(images: pa.Table, rows: int, number: int) -> pa.Table:
    """Returns the images of one of several calls, as Ray Data gives them: one block; they go round."""
    first = number * rows % len(images)
    pieces, left = [], rows
    while left:
        piece = images.slice(first, left)
        pieces.append(piece)
        left, first = left - len(piece), 0
    return pa.concat_tables(pieces).combine_chunks()


def _gpu_bytes() -> int:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
