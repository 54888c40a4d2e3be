"""The first stage, in CPU tasks: reads fragments of the input, fetches the images, cuts the crops that the model needs.

A `RowError` becomes the status of a row only here, in `_error_columns`. Rows travel as Arrow tables, so that kept
columns keep their types. This module does not import torch.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.extensions import ArrowTensorArray

from jobs.captioning.crash_guard import DECODE_LIMIT_S, READ_IN_VAIN, CrashGuardClient, DecodeClock
from jobs.captioning.distinct_rows import ranges_of
from jobs.captioning.monitor import MonitorClient
from jobs.captioning.routes import Routes
from jobs.captioning.stage_report import StageReport
from jobs.cluster.session import limit_blocks
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError
from smallcap.images.crops import CropPlan, Pixels
from smallcap.images.fetching import FETCH_CONCURRENCY, FetchOptions, fetch_objects
from smallcap.images.fragments import InputBatch
from smallcap.images.work_list import read_fragment, unread_rows
from smallcap.machine.actor_plan import ActorPlan
from smallcap.output.coverage import WorkItem
from smallcap.output.schema import (
    ENDS_FRAGMENT,
    FRAGMENT,
    FRAGMENT_ROW,
    IMAGE_BYTES_COLUMN,
    LEFT_OUT,
    STATUS_ERROR,
    STATUS_OK,
)

VISION_PIXELS, RETRIEVAL_PIXELS = "smallcap.vision_pixels", "smallcap.retrieval_pixels"
CONTENT_KEY = "smallcap.content_key"  # what sampling tells images apart by
INDEX_NAME = "smallcap.index_name"  # of several indexes, the only one that is searched for an image
_LEFT_OUT_TYPE = pa.list_(pa.int32())
# For a block's files, its crops, and an image of `decoding_room.OWN_BYTES`; larger ones wait for room of their own. It
# also makes the task differ from an actor with one CPU, into which Ray would otherwise fuse it.
_LOAD_MEMORY_BYTES = 512 << 20
_MOST_TASKS = 4_000  # offering a task takes the driver milliseconds; with more fragments, a task takes several
_CRASHED = RowError(
    ErrorCode.CRASHED,
    "The process that decoded this image died more than once.",
    remedy="Look at it alone; --retry-failed tries it again.",
)
_TOO_SLOW = RowError(ErrorCode.TOO_LARGE, f"Decoding the image took more than {DECODE_LIMIT_S:g} s of CPU time.")


@dataclass(frozen=True)
class LoadSpec:
    """What a loading task needs to know."""

    plan: CropPlan
    input: InputConfig
    kept_columns: pa.Schema
    keep_bytes: bool  # whether image files are kept, for the output's tars
    monitor: MonitorClient
    crash_guard: CrashGuardClient
    keys: bool = False  # whether captions are sampled, for which each image needs its content key
    routes: Routes | None = None  # where a column says which index is searched


@dataclass
class _Loaded:
    """A batch's images, and what loading them took."""

    images: list[Pixels | RowError]
    files: list[bytes | None]
    seconds: float = 0.0
    fetch_s: float = 0.0
    retries: int = 0
    fetched_bytes: int = 0


def start_loading(
    items: Sequence[Any],
    load: Callable[..., Iterator[pa.Table]],
    spec: LoadSpec,
    images_per_block: int,
    actors: ActorPlan,
) -> ray.data.Dataset:
    """Returns the first stage of a pipeline, which loads a few blocks ahead of the next stage.

    Args:
        items: The work items.
        load: A function of a table, whose column `item` has pickled work items, and of `spec`; it yields tables.
        spec: What the loading tasks need to know.
        images_per_block: The most images in a block; Ray counts in blocks what waits for the next stage.
        actors: The pool that is fed.
    """
    blocks = task_inputs(items)
    inputs = ray.data.from_arrow(blocks)
    limit_blocks(inputs, spec.plan.image_bytes * images_per_block)
    most = None if actors.load_tasks is None else min(actors.load_tasks, len(blocks))
    return inputs.map_batches(
        load,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"spec": spec},
        compute=ray.data.TaskPoolStrategy(size=most),
        memory=_LOAD_MEMORY_BYTES,
        **_cpus_of_tasks(actors),
    )


def _cpus_of_tasks(actors: ActorPlan) -> dict[str, Any]:
    """Returns how Ray Data is told of the CPUs of a loading task.

    Where actors have GPUs, whole CPUs say how many tasks a node takes. On CPUs the tasks ask Ray for next to nothing,
    so that no actor waits for them, and Ray Data is told of nothing at all: it shares a node's CPUs out among jobs in
    whole ones, of one CPU none.
    """
    if actors.device == "cuda":
        return {"num_cpus": actors.cpus_per_task}
    return {"num_cpus": 0, "ray_remote_args_fn": partial(dict, num_cpus=actors.cpus_per_task)}


def task_inputs(items: Sequence[Any]) -> list[pa.Table]:
    """Returns the input of the loading tasks: one block for each, with pickled work items in its column `item`.

    Ray Data's `repartition` would make the same blocks, but about ten a second, and no task starts before the last one.
    """
    together = -(-len(items) // _MOST_TASKS)
    pickled = [pickle.dumps(item) for item in items]
    return [pa.table({"item": pickled[start : start + together]}) for start in range(0, len(pickled), together)]


def load_images(batch: pa.Table, spec: LoadSpec) -> Iterator[pa.Table]:
    """Reads fragments of the input, fetches their images and cuts the crops that the model needs.

    Args:
        batch: A table with pickled `WorkItem`s in its column `item`.
        spec: What the task needs to know.

    Yields:
        Tables of at most 256 images: `image_id`, `image_uri`, `width`, `height`, `status`, `error_code`,
        `error_message`, the row's place in the input, the kept columns, [B, S, S, 3] uint8 `VISION_PIXELS`, and, where
        they are needed, `RETRIEVAL_PIXELS`, int64 `CONTENT_KEY`, `INDEX_NAME` and `image_bytes`. The pixels of failed
        rows are 0.
    """
    for pickled in batch["item"]:
        item: WorkItem = pickle.loads(pickled.as_py())  # noqa: S301 - this job's driver wrote it
        for images in read_guarded(item, spec):
            yield load_batch(item.fragment.number, images, spec)


def read_guarded(item: WorkItem, spec: LoadSpec) -> Iterator[InputBatch]:
    """Yields the images of a work item; the guard ends a tar or Parquet file whose reading kills its process."""
    fragment, guard = item.fragment, spec.crash_guard
    batches = read_fragment(fragment, item.wanted, spec.input, spec.kept_columns)
    if fragment.kind == "uris":  # which this job wrote
        yield from batches
        return
    read = 0  # rows
    for step in count():
        if guard.begin_reading(fragment.number, step):
            what = f"The process that read this file died {READ_IN_VAIN} times."
            error = RowError(ErrorCode.CRASHED, what, where=fragment.uri, remedy=_CRASHED.remedy)
            yield from unread_rows(fragment, item.wanted, read, error, spec.kept_columns)
            return
        images = next(batches, None)
        guard.end_reading(fragment.number, step)
        if images is None:
            return
        read = int(images.rows[-1]) + 1
        yield images


def load_batch(number: int, images: InputBatch, spec: LoadSpec) -> pa.Table:
    """Loads a batch of a fragment's images; see `load_images`."""
    loaded = _load(number, images, spec)
    ended = images.ends_fragment
    spec.monitor.report(
        StageReport(
            stage="load",
            images=len(images.rows),
            rows=ranges_of(np.full(len(images.rows), number), images.rows),
            seconds=loaded.seconds,
            fetch_s=loaded.fetch_s,
            retries=loaded.retries,
            bytes=loaded.fetched_bytes,
            by_pillow=sum(isinstance(image, Pixels) and image.by_pillow for image in loaded.images),
            ended_fragments=int(ended),
            ended_images=int(images.rows[-1]) + 1 if ended else 0,
        )
    )
    return _loaded_table(number, images, loaded, spec)


def _load(number: int, images: InputBatch, spec: LoadSpec) -> _Loaded:
    """Fetches and decodes a batch; the crash guard leaves out images that have killed their process."""
    started = time.perf_counter()
    loaded = _Loaded([], [])
    position_of = {row: position for position, row in enumerate(images.rows.tolist())}
    refused = _refused(images, spec)
    todo = [row for row, refusal in zip(position_of, refused, strict=True) if refusal is None]

    def load_rows(rows: list[int]) -> list[tuple[Pixels | RowError, bytes | None]]:
        done: list[tuple[Pixels | RowError, bytes | None]] = []
        for start in range(0, len(rows), FETCH_CONCURRENCY):  # bounds the files in memory; their crops are small
            some = rows[start : start + FETCH_CONCURRENCY]
            files = _files(images, [position_of[row] for row in some], spec, loaded)
            for row, data in zip(some, files, strict=True):
                clock.begin(row)
                pixels = _decode(data, spec, images.image_uris[position_of[row]])
                kept = data if spec.keep_bytes and isinstance(pixels, Pixels) else None
                done.append((pixels, kept if isinstance(kept, bytes) else None))
            clock.begin(None)
        return done

    with DecodeClock(lambda row: spec.crash_guard.give_up(number, row)) as clock:
        guarded = spec.crash_guard.run_guarded(number, todo, load_rows)
    results = dict(zip(todo, guarded, strict=True))
    left_out = [row for row, result in results.items() if result is None]
    too_slow = spec.crash_guard.too_slow(number, left_out) if left_out else []
    for row, refusal in zip(position_of, refused, strict=True):
        pixels, data = results.get(row) or (refusal or (_TOO_SLOW if row in too_slow else _CRASHED), None)
        loaded.images.append(pixels)
        loaded.files.append(data)
    loaded.seconds = time.perf_counter() - started
    return loaded


def _refused(images: InputBatch, spec: LoadSpec) -> list[RowError | None]:
    """Returns for each image why it is not even fetched; None where it is."""
    if spec.routes is None or images.kept is None:
        return [None] * len(images.rows)
    return spec.routes.refusals(spec.routes.of_rows(images.kept))


def _files(images: InputBatch, positions: Sequence[int], spec: LoadSpec, loaded: _Loaded) -> list[bytes | RowError]:
    """Returns the image files: from the input's shard if it holds them, or else fetched."""
    if images.data is not None:
        return [images.data[position] for position in positions]
    started = time.perf_counter()
    fetched = fetch_objects([images.image_uris[position] for position in positions], FetchOptions.of(spec.input))
    loaded.fetch_s += time.perf_counter() - started
    loaded.retries += fetched.retries
    loaded.fetched_bytes += sum(len(data) for data in fetched.data if isinstance(data, bytes))
    return fetched.data


def _decode(data: bytes | RowError, spec: LoadSpec, uri: str) -> Pixels | RowError:
    if isinstance(data, RowError):
        return data
    try:
        return spec.plan.crop(data, spec.input.max_image_pixels, uri)
    except RowError as error:
        return error


def _error_columns(error: RowError | None) -> dict[str, Any]:
    """Returns a row's `status`, `error_code` and `error_message`."""
    if error is None:
        return {"status": STATUS_OK, "error_code": None, "error_message": None}
    return {"status": STATUS_ERROR, "error_code": str(error.code), "error_message": str(error)}


def _loaded_table(number: int, images: InputBatch, loaded: _Loaded, spec: LoadSpec) -> pa.Table:
    rows = len(images.rows)
    errors = [_error_columns(image if isinstance(image, RowError) else None) for image in loaded.images]
    pixels = [_blank(spec.plan) if isinstance(image, RowError) else image for image in loaded.images]
    ends = np.zeros(rows, bool)
    ends[-1] = images.ends_fragment
    columns: dict[str, Any] = {
        "image_id": pa.array(images.image_ids, pa.string()),
        "image_uri": pa.array(images.image_uris, pa.string()),
        "width": pa.array([image.width for image in pixels], pa.int32()),
        "height": pa.array([image.height for image in pixels], pa.int32()),
        **{name: pa.array([error[name] for error in errors], pa.string()) for name in errors[0]},
        FRAGMENT: pa.array(np.full(rows, number, np.int32)),
        FRAGMENT_ROW: pa.array(images.rows, pa.int32()),
        ENDS_FRAGMENT: pa.array(ends),
        LEFT_OUT: pa.array([*[None] * (rows - 1), images.left_out if any(images.left_out) else None], _LEFT_OUT_TYPE),
        **pixel_columns(pixels),
    }
    if spec.keys:  # here and not in the actor: it takes longer than all else that an actor's CPU does for an image
        columns[CONTENT_KEY] = pa.array([image.content_key for image in pixels], pa.int64())
    if spec.routes is not None and images.kept is not None:
        columns[INDEX_NAME] = pa.array(spec.routes.of_rows(images.kept), pa.string())
    if images.kept is not None:
        columns |= {name: images.kept[name] for name in images.kept.column_names}
    if spec.keep_bytes:
        columns[IMAGE_BYTES_COLUMN] = pa.array(loaded.files, pa.large_binary())
    return pa.table(columns)


def pixel_columns(pixels: Sequence[Pixels]) -> dict[str, ArrowTensorArray]:
    """Returns the crops of images as tensor columns; a second one if the retrieval encoder takes other crops."""
    columns = {VISION_PIXELS: ArrowTensorArray.from_numpy(np.stack([image.vision for image in pixels]))}
    retrieval = [image.retrieval for image in pixels if image.retrieval is not None]
    if retrieval:
        columns[RETRIEVAL_PIXELS] = ArrowTensorArray.from_numpy(np.stack(retrieval))
    return columns


def _blank(plan: CropPlan) -> Pixels:
    """Returns the pixels of a failed row, so that the pixels of a batch remain one array."""
    vision = np.zeros((plan.vision.size_px, plan.vision.size_px, 3), np.uint8)
    size = plan.retrieval.size_px if plan.retrieval else 0
    return Pixels(vision, np.zeros((size, size, 3), np.uint8) if plan.retrieval else None, 0, 0, by_pillow=False)
