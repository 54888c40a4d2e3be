"""Times how a captioning run loads and captions, on a few of its images, for an estimate of the whole.

A pipeline of Ray Data does it, as in a run, so that what Ray Data itself takes to start is in the time as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.cluster.errors import GuardedActor
from jobs.cluster.faults import FaultGuardClient
from jobs.cluster.resources import cores_here, living_nodes
from jobs.cluster.tasks import iter_small_rows, map_in_actors
from smallcap.machine.actor_plan import ActorPlan
from smallcap.machine.process_memory import private_bytes

if TYPE_CHECKING:
    import ray.data

_TIMED_ROUNDS = 3  # of calls at the same time, after one that warms up, in which a GPU's steps are recorded
_LOADING = "smallcap.loading"  # the column with what loading took


@dataclass(frozen=True)
class Calibration:
    """Measurements of a few batches."""

    images: int  # how many were captioned in the time
    load_s: float  # per image, on one CPU
    caption_s: float  # per image, in one actor
    start_s: float  # from nothing but Ray to the first call's captions: processes, models, the first images
    actor_bytes: int  # the actor's private memory, without the shared pages of the index
    gpu_bytes: int = 0  # the most GPU memory that the actor took
    load_cpu_s: float = 0.0  # CPU time of loading an image
    caption_cpu_s: float = 0.0  # CPU time of captioning an image, of all threads
    cores_per_cpu: float = 1.0  # of the actor's node, for each CPU that Ray counts there
    loaded_images: int = 0  # at the end of `start_s`
    captioned_images: int = 0  # at the end of `start_s`


def calibrate(
    loaded: ray.data.Dataset,
    images: int,
    make_captioner: Callable[[], Callable[[pa.Table], Any]],
    plan: ActorPlan,
    rows: int,
    at_once: int,
    faults: FaultGuardClient,
) -> Calibration:
    """Loads a few batches in a CPU task and captions them in an actor with the plan's resources.

    As in a run, the captioner is loaded while the images are. Both are timed as the run does them, and without what
    happens only once: the first batch that is loaded, if there are others, and the captioner's first calls.

    Args:
        loaded: The images as the run's loading tasks make them, in tables of `time_loading`, all from one task.
        images: Their number.
        make_captioner: A picklable function that loads the actor's captioner, which takes such tables.
        plan: The run's actors.
        rows: How many images a call of the captioner takes. They are taken again and again from those that are loaded.
        at_once: How many calls go on in the actor at the same time.
        faults: Counts the actor's faults, as in a run.

    Raises:
        SmallCapError: Loading or captioning failed; Ray's error is around it, see `unwrapped_errors`.
    """
    began = time.perf_counter()
    pool = replace(plan, num_actors=1, max_actors=1)
    arguments = (make_captioner, rows, at_once)
    (timed,) = iter_small_rows(map_in_actors(loaded, CalibratingActor, arguments, images, pool, faults))
    start_s = time.perf_counter() - began - timed["later_s"]
    captioned = rows * at_once * _TIMED_ROUNDS
    cpus = living_nodes()[timed["node"]]["Resources"].get("CPU", timed["cores"])
    return Calibration(
        images=captioned,
        load_s=timed["load_s"],
        caption_s=timed["seconds"] / captioned,
        start_s=start_s,
        actor_bytes=timed["actor_bytes"],
        gpu_bytes=timed["gpu_bytes"],
        load_cpu_s=timed["load_cpu_s"],
        caption_cpu_s=timed["cpu_seconds"] / captioned,
        cores_per_cpu=min(1.0, timed["cores"] / cpus),
        loaded_images=images,
        captioned_images=rows * at_once,
    )


def time_loading(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yields all images in one table, which says what loading one took: without the first batch if there are others."""
    tables, ends = [], [(time.perf_counter(), time.process_time())]
    for batch in batches:
        tables.append(batch)
        ends.append((time.perf_counter(), time.process_time()))
    counted = slice(1, None) if len(tables) > 1 else slice(None)
    timed = sum(map(len, tables[counted]))
    took = [(last - first) / timed for first, last in zip(ends[counted][0], ends[-1], strict=True)]
    images = pa.concat_tables(tables)
    yield images.append_column(_LOADING, pa.array([took] * len(images), pa.list_(pa.float64())))


class CalibratingActor(GuardedActor):
    """Times calls of a captioner. A call takes all images at once, and returns a row of what was measured."""

    def load(self, make_captioner: Callable[[], Callable[[pa.Table], Any]], rows: int, at_once: int) -> None:
        """Makes the captioner; a call of it takes so many rows, and so many calls go on at once."""
        self._captioner, self._rows, self._at_once = make_captioner(), rows, at_once
        self._numbers = count()

    def process(self, images: pa.Table) -> pa.Table:
        """Captions the images in some rounds of calls; the first one belongs to the start."""
        load_s, load_cpu_s = images[_LOADING][0].as_py()
        images = images.drop_columns([_LOADING])
        self._caption(images, 1)
        started, cpu_started = time.perf_counter(), time.process_time()
        self._caption(images, _TIMED_ROUNDS)
        row = {
            "load_s": load_s,
            "load_cpu_s": load_cpu_s,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            **self._describe(),
        }
        return pa.Table.from_pylist([row | {"later_s": time.perf_counter() - started}])  # than the first captions

    def _caption(self, images: pa.Table, rounds: int) -> None:
        numbers = islice(self._numbers, self._at_once * rounds)
        calls = [_rows_of_call(images, self._rows, number) for number in numbers]
        with ThreadPoolExecutor(self._at_once) as threads:
            for _ in threads.map(self._captioner, calls):
                pass

    def _describe(self) -> dict[str, Any]:
        """Returns the node, how many cores this process may use there, and the memory that it took."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return {"node": node, "cores": cores_here(), "actor_bytes": private_bytes(), "gpu_bytes": _gpu_bytes()}


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
