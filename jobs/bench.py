"""The benchmark's way through the job: tables as loading tasks make them go in, tables for the writer come out.

No Ray is started. `smallcap.benchmark` measures the stages, and calls this for the whole loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from jobs.captioning.caption_table import TableCaptioner
from jobs.captioning.layout import BATCHES_PER_CALL, CALLS_AT_ONCE
from jobs.captioning.load import pixel_columns
from jobs.cluster.display import show_while
from smallcap import storage
from smallcap.benchmark.ready_captioner import IMAGE_PX, HostResult, PartTimes, ReadyCaptioner, image_id
from smallcap.benchmark.stages import BenchmarkResult, run_benchmark
from smallcap.captioner import Captioner
from smallcap.captioner_setup import CaptionerOptions
from smallcap.config import BenchmarkOptions
from smallcap.images.crops import Pixels
from smallcap.images.fragments import FRAGMENT_ROWS
from smallcap.machine.actor_plan import LARGEST_BATCH
from smallcap.machine.description import describe_machine
from smallcap.machine.process_memory import keep_freed_memory
from smallcap.output.schema import ENDS_FRAGMENT, FRAGMENT, FRAGMENT_ROW, STATUS_OK

_HOST_CALLS = 8


def run(options: BenchmarkOptions) -> BenchmarkResult:
    """Measures every stage, and the whole loop as an actor of the job goes through it.

    Raises:
        ConfigError: The retrieval encoder is unknown.
    """
    with show_while("Measuring each stage, then all of them together"):
        return run_benchmark(options, table_loop)


def table_loop(captioner: Captioner, batches: Sequence[Sequence[Pixels]]) -> Callable[[], int]:
    """Returns a function that captions batches of images as an actor does, and returns how many they are.

    Args:
        captioner: Captions the images.
        batches: Crops, in batches of one size.
    """
    device = captioner.model.device.type
    caption = TableCaptioner(captioner, len(batches[0]), exclude_own=True, embeds=False)
    size = BATCHES_PER_CALL[device]
    calls = [
        loaded_table([image for batch in batches[start : start + size] for image in batch])
        for start in range(0, len(batches), size)
    ]
    at_once = CALLS_AT_ONCE[device]
    threads = ThreadPoolExecutor(at_once, "call") if at_once > 1 else None  # they last, as those of an actor do

    def loop() -> int:
        return sum(len(table) for table, _ in (threads.map if threads else map)(caption, calls))

    return loop


def loaded_table(pixels: Sequence[Pixels]) -> pa.Table:
    """Returns images as `jobs.captioning.load.load_images` does, in blocks of the size of a fragment."""
    return pa.concat_tables(
        _loaded_block(number, pixels[start : start + FRAGMENT_ROWS])
        for number, start in enumerate(range(0, len(pixels), FRAGMENT_ROWS))
    )


def _loaded_block(number: int, pixels: Sequence[Pixels]) -> pa.Table:
    count = len(pixels)
    ids = [image_id(number * FRAGMENT_ROWS + row) for row in range(count)]
    columns: dict[str, Any] = {
        "image_id": ids,
        "image_uri": [f"s3://bucket/{id_}" for id_ in ids],
        "width": pa.array([image.width for image in pixels], pa.int32()),
        "height": pa.array([image.height for image in pixels], pa.int32()),
        "status": [STATUS_OK] * count,
        "error_code": pa.nulls(count, pa.string()),
        "error_message": pa.nulls(count, pa.string()),
        FRAGMENT: np.full(count, number, np.int32),
        FRAGMENT_ROW: np.arange(count, dtype=np.int32),
        ENDS_FRAGMENT: np.zeros(count, bool),
        **pixel_columns(pixels),
    }
    return pa.table(columns)


def run_host(options: BenchmarkOptions) -> HostResult:
    """Measures the CPU's part of captioning on a GPU, on any machine: what the GPU computes is answered at once.

    Of the options, those of prompts, index and repeats count; batches and calls are those of a run on a GPU.
    """
    keep_freed_memory()
    torch.set_num_threads(1)  # OpenMP's threads spin while they wait, which would count
    batch_size = LARGEST_BATCH["cuda"]
    images = batch_size * BATCHES_PER_CALL["cuda"]
    with storage.scratch_folder() as folder:
        wanted = CaptionerOptions(k=options.k, num_beams=options.num_beams)
        captioner = ReadyCaptioner(folder, wanted, options.captions)
        caption = TableCaptioner(captioner, batch_size, exclude_own=True, embeds=False)
        batch = loaded_table(_random_crops(images))
        with show_while("Measuring what the CPU does for a GPU"):
            runs = [_time_calls(captioner, lambda: caption(batch)) for _ in range(options.repeats + 1)]
    total, times = min(runs[1:], key=lambda run: run[0])
    us = 1e6 / (images * _HOST_CALLS)
    parts = {name: seconds * us for name, seconds in times.seconds.items()}
    return HostResult(
        us_per_image=total * us,
        parts=parts | {"Arrow tables, and the rest": total * us - sum(parts.values())},
        images_per_s=1e6 / (total * us),
        options=options.model_dump(include={"k", "num_beams", "captions", "repeats"}),
        machine=describe_machine(torch.get_num_threads(), "cpu"),
    )


def _random_crops(count: int) -> list[Pixels]:
    crops = np.random.default_rng(0).integers(0, 256, (count, IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
    return [Pixels(crop, None, 640, 480) for crop in crops]


def _time_calls(captioner: ReadyCaptioner, call: Callable[[], object]) -> tuple[float, PartTimes]:
    """Returns the CPU time of several calls in s, and that of their parts."""
    captioner.times = PartTimes()
    started = time.process_time()
    for _ in range(_HOST_CALLS):
        call()
    return time.process_time() - started, captioner.times
