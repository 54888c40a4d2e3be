"""Measures the sides of `benchmarks.job`, each in a separate process: the bare loop, smallcap's job, plain Ray Data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from smallcap.captioner import Captioner
from smallcap.config import CaptionConfig
from smallcap.images.crops import Pixels
from smallcap.machine.process_memory import keep_freed_memory

_READ_PX = 256  # plain Ray Data reads all images at one size: its batches are arrays
_LEAST_DIFFERENCE = 0.1  # of the shorter time


@dataclass(frozen=True)
class Settings:
    """What all sides share."""

    model: str
    index: str
    small: str  # folder of N images
    large: str  # folder of 2N images
    work: str
    device: str
    dtype: str
    threads: int  # of one captioner
    actors: int
    batch_size: int
    max_new_tokens: int | None
    rounds: int

    def captioner(self) -> Captioner:
        """Loads the captioner that every side uses."""
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        return Captioner.from_pretrained(
            self.model, self.index, device=self.device, dtype=self.dtype, max_new_tokens=self.max_new_tokens
        )


def bare(settings: Settings) -> dict[str, Any]:
    """Measures a loop in one process: decoding and captioning in turns, and decoding in a second thread."""
    captioner = settings.captioner()
    files = sorted(Path(settings.small).iterdir())
    batches = [files[start : start + settings.batch_size] for start in range(0, len(files), settings.batch_size)]

    def decode(paths: Sequence[Path]) -> list[Pixels]:
        return [captioner.crop_plan.crop(path.read_bytes()) for path in paths]

    def in_turns() -> Iterator[tuple[list[Pixels], None]]:
        return ((decode(batch), None) for batch in batches)

    def beside() -> Iterator[tuple[list[Pixels], None]]:
        with ThreadPoolExecutor(1, "decode") as thread:
            waiting = deque(thread.submit(decode, batch) for batch in batches[:2])
            for following in [*batches[2:], None, None][: len(batches)]:
                pixels = waiting.popleft().result()
                if following is not None:
                    waiting.append(thread.submit(decode, following))
                yield pixels, None

    def seconds(loop: Callable[[], Iterator[tuple[list[Pixels], None]]]) -> float:
        start = time.perf_counter()
        done = sum(len(results) for results in captioner.caption_batches(loop()))
        assert done == len(files)
        return time.perf_counter() - start

    loops = {"sequence": in_turns, "beside": beside}
    seconds(beside)  # unmeasured: pages, threads, CUDA graphs
    best = {name: float("inf") for name in loops}
    for _ in range(settings.rounds):
        for name, loop in loops.items():
            best[name] = min(best[name], seconds(loop))
    return {f"{name}_images_per_s": len(files) / taken for name, taken in best.items()}


def smallcap(settings: Settings) -> dict[str, Any]:
    """Measures `jobs.caption.run`, in one Ray, repeatedly into new folders."""
    from jobs import caption

    options = {
        "index": settings.index,
        "model": settings.model,
        "generation": {"max_new_tokens": settings.max_new_tokens},
        "compute": {
            "device": settings.device,
            "dtype": settings.dtype,
            "batch_size": settings.batch_size,
            "num_actors": settings.actors,
        },
    }

    def run(folder: str, out: str) -> None:
        caption.run(CaptionConfig.model_validate({"images": [folder], "out": out, **options}))

    return _time_job(settings, run)


class PlainCaptioner:
    """The class that a user would write for map_batches."""

    def __init__(self, settings: Settings) -> None:
        self.captioner = settings.captioner()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Captions a batch of read images."""
        pixels = [self.captioner.crop_plan.crop(Image.fromarray(image)) for image in batch["image"]]
        captions = [result.caption for result in self.captioner.caption_batch(pixels)]
        return {"path": batch["path"], "caption": np.array(captions)}


def plain(settings: Settings) -> dict[str, Any]:
    """Ray Data, used as its documentation shows."""
    import ray

    def run(folder: str, out: str) -> None:
        images = ray.data.read_images(folder, include_paths=True, size=(_READ_PX, _READ_PX), mode="RGB")
        images.map_batches(
            PlainCaptioner,
            fn_constructor_args=(settings,),
            batch_size=settings.batch_size,
            compute=ray.data.ActorPoolStrategy(size=settings.actors),
            num_cpus=1,
            num_gpus=1 if settings.device == "cuda" else 0,
        ).write_parquet(out)

    return _time_job(settings, run)


def _time_job(settings: Settings, run: Callable[[str, str], object]) -> dict[str, Any]:
    """Times runs over 2N and N images in turns; their difference is the time of N images in a warm job."""
    from jobs.cluster.session import connect

    start = time.perf_counter()
    connect()
    ray_s = time.perf_counter() - start
    folders = {"large": settings.large, "small": settings.small}
    times: dict[str, list[float]] = {name: [] for name in folders}
    # begins and ends with the larger size, so a machine that slows down favours neither
    for number, name in enumerate([*["large", "small"] * settings.rounds, "large"]):
        start = time.perf_counter()
        run(folders[name], str(Path(settings.work) / f"{number}-{name}"))
        times[name].append(time.perf_counter() - start)
    images = {name: len(list(Path(folder).iterdir())) for name, folder in folders.items()}
    more, difference = images["large"] - images["small"], min(times["large"]) - min(times["small"])
    # a difference that other work on the machine has hidden says nothing
    warm = more / difference if difference > _LEAST_DIFFERENCE * min(times["small"]) else None
    return {
        "ray_start_s": ray_s,
        "large_s": times["large"],
        "small_s": times["small"],
        "warm_images_per_s": warm,
        "start_s": None if warm is None else min(times["small"]) - images["small"] / warm,  # what is not captioning
        "whole_images_per_s": images["large"] / (ray_s + times["large"][0]),  # of the first run, Ray's start included
    }


SIDES: dict[str, Callable[[Settings], dict[str, Any]]] = {"bare": bare, "smallcap": smallcap, "plain": plain}


def run_side(side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures a side; `settings` are the fields of `Settings`, as JSON."""
    return SIDES[side](Settings(**settings))
