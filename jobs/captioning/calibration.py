"""Times how a captioning run loads and captions, on a few of its images, for an estimate of the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import pyarrow as pa

from jobs.cluster.resources import actor_resources, cores_here, living_nodes
from smallcap.machine.actor_plan import ActorPlan
from smallcap.machine.process_memory import private_bytes

_TIMED_ROUNDS = 3  # of calls at the same time, after one that warms up, in which a GPU's steps are recorded


@dataclass(frozen=True)
class Calibration:
    """Measurements of a few batches."""

    images: int  # how many were captioned in the time
    load_s: float  # per image, on one CPU
    caption_s: float  # per image, in one actor
    start_s: float  # from nothing but Ray to the first call's captions: processes, imports, models, the first images
    actor_bytes: int  # the actor's private memory, without the shared pages of the index
    gpu_bytes: int = 0  # the most GPU memory that the actor took
    load_cpu_s: float = 0.0  # CPU time of loading an image
    caption_cpu_s: float = 0.0  # CPU time of captioning an image, of all threads
    cores_per_cpu: float = 1.0  # of the actor's node, for each CPU that Ray counts there
    loaded_images: int = 0  # at the end of `start_s`
    captioned_images: int = 0  # at the end of `start_s`


@dataclass(frozen=True)
class _Loading:
    """What loading took: per image, without the first batch if there are others."""

    images: int
    seconds: float
    cpu_seconds: float


def calibrate(
    load: Callable[[], Iterable[pa.Table]],
    make_captioner: Callable[[], Callable[[pa.Table], Any]],
    plan: ActorPlan,
    rows: int,
    at_once: int,
) -> Calibration:
    """Loads a few batches in a CPU task and captions them in an actor with the plan's resources; connect to Ray first.

    As in a run, the captioner is loaded while the images are. Both are timed as the run does them, and without what
    happens only once: the first batch that is loaded, if there are others, and the captioner's first calls.

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

    began = time.perf_counter()
    time_loading = ray.remote(num_cpus=plan.cpus_per_task)(_time_loading).options(num_returns=2)
    loaded, images = time_loading.remote(load)
    actor = ray.remote(_CalibratingActor).options(**actor_resources(plan)).remote()
    try:
        made = actor.make.remote(make_captioner, rows, at_once)
        ray.get([made, actor.caption.remote(images, 1)])
        start_s = time.perf_counter() - began
        loading: _Loading = ray.get(loaded)
        seconds, cpu_seconds = ray.get(actor.caption.remote(images, _TIMED_ROUNDS))
        node, cores, actor_bytes, gpu_bytes = ray.get(actor.describe.remote())
    finally:
        ray.kill(actor)
    timed = rows * at_once * _TIMED_ROUNDS
    return Calibration(
        images=timed,
        load_s=loading.seconds,
        caption_s=seconds / timed,
        start_s=start_s,
        actor_bytes=actor_bytes,
        gpu_bytes=gpu_bytes,
        load_cpu_s=loading.cpu_seconds,
        caption_cpu_s=cpu_seconds / timed,
        cores_per_cpu=min(1.0, cores / living_nodes()[node]["Resources"].get("CPU", cores)),
        loaded_images=loading.images,
        captioned_images=rows * at_once,
    )


def _time_loading(load: Callable[[], Iterable[pa.Table]]) -> tuple[_Loading, pa.Table]:
    """Returns what loading took, and all images."""
    batches, ends = [], [(time.perf_counter(), time.process_time())]
    for batch in load():
        batches.append(batch)
        ends.append((time.perf_counter(), time.process_time()))
    counted = slice(1, None) if len(batches) > 1 else slice(None)
    images = pa.concat_tables(batches)
    first, last = ends[counted][0], ends[-1]
    timed = sum(map(len, batches[counted]))
    return _Loading(len(images), (last[0] - first[0]) / timed, (last[1] - first[1]) / timed), images


class _CalibratingActor:
    def make(self, make_captioner: Callable[[], Callable[[pa.Table], Any]], rows: int, at_once: int) -> None:
        """Makes the captioner; a call of it takes so many rows, and so many calls go on at once."""
        self._captioner, self._rows, self._at_once = make_captioner(), rows, at_once
        self._numbers = count()

    def caption(self, images: pa.Table, rounds: int) -> tuple[float, float]:
        """Captions images in some rounds of calls; returns the seconds, and those of CPU time."""
        numbers = islice(self._numbers, self._at_once * rounds)
        calls = [_rows_of_call(images, self._rows, number) for number in numbers]
        with ThreadPoolExecutor(self._at_once) as threads:
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in threads.map(self._captioner, calls):
                pass
            return time.perf_counter() - started, time.process_time() - cpu_started

    def describe(self) -> tuple[str, int, int, int]:
        """Returns the node, how many cores this process may use there, and the memory that it took."""
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node, cores_here(), private_bytes(), _gpu_bytes()


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
