"""Measures at published sizes, with random weights: a batch's memory against its estimate, and each stage's speed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from smallcap.batch_size import largest_batch
from smallcap.benchmark.random_content import make_photo
from smallcap.benchmark.stages import build_captioner, measure_captioner
from smallcap.captioner import Captioner
from smallcap.config import BenchmarkOptions, Device
from smallcap.doctor.report import Finding, attempt, ok, warn
from smallcap.images.crops import Pixels
from smallcap.machine.precision import resolve_device, resolve_dtype
from smallcap.machine.process_memory import return_freed_memory, status_bytes
from smallcap.options import load_config
from smallcap.storage import scratch_folder

_STEP_BYTES = 16 << 20  # of the memory that is looked for
_SPARE_BYTES = 48 << 20  # beyond the estimate: allocators take memory in blocks, and libraries some for themselves
_SIZES = {
    "cpu": {"images": 4, "batch_size": 4, "captions": 5000, "repeats": 1},
    "cuda": {"images": 2048, "batch_size": 256, "captions": 100_000, "repeats": 3},
}
_REMEDY = "Look at the line's error; smallcap bench shows all of it."


def measure(wanted: Device) -> Iterator[Finding]:
    """Reports a batch's memory, and the stages' images per second."""
    device = resolve_device(wanted)
    options = load_config(BenchmarkOptions, flags={"device": device, **_SIZES[device]})
    with scratch_folder() as folder:
        captioner = build_captioner(options, resolve_dtype(options.dtype, device), folder)
        yield from attempt("memory of a batch", lambda: [_compare_memory(captioner, options)], _REMEDY)
        yield from attempt("stage rates", lambda: _rates(captioner, options), _REMEDY)


def _rates(captioner: Captioner, options: BenchmarkOptions) -> Iterator[Finding]:
    result = measure_captioner(captioner, options, _loop)
    rates = "; ".join(f"{stage.stage}: {_rounded(stage.images_per_s)}" for stage in result.stages)
    dtype = result.machine["dtype"]
    yield ok("stage rates", f"images/s in {dtype}, each stage alone; {rates}")
    yield ok("stage rates", f"all from crops to captions: {_rounded(result.images_per_s)} images/s")


def _loop(captioner: Captioner, batches: Sequence[Sequence[Pixels]]) -> Callable[[], int]:
    """Returns a function that captions batches in a row and returns how many images they have."""
    return lambda: sum(map(len, captioner.caption_batches((pixels, None) for pixels in batches)))


def _rounded(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


def _compare_memory(captioner: Captioner, options: BenchmarkOptions) -> Finding:
    """Compares what a batch takes with the memory for which `largest_batch` would allow it."""
    crops = _random_crops(captioner, options.batch_size)
    captioner.caption_batch(crops[:1])  # what comes into memory at the first use is not a batch's
    with _peak_bytes(captioner.model.device) as taken:
        results = captioner.caption_batch(crops)
    embeddings = np.stack([result.embedding for result in results if result.embedding is not None])
    longest = max(map(len, captioner.prompt(captioner.retrieve(embeddings))))
    config, dtype = captioner.model.config, resolve_dtype(options.dtype, options.device)

    def allows(free_bytes: int) -> bool:
        given = (config, None, captioner.generation, longest, free_bytes, dtype, options.device)
        return largest_batch(*given) >= options.batch_size

    estimate = next(size for size in itertools.count(_STEP_BYTES, _STEP_BYTES) if allows(size))
    begin = f"such batches begin at {_mb(estimate)} of free memory"
    if not taken:
        return ok("memory of a batch", f"this system does not say what {options.batch_size} images took; {begin}")
    shown = f"{options.batch_size} images took {_mb(taken[0])}; {begin}"
    if taken[0] > estimate + _SPARE_BYTES:
        return warn("memory of a batch", shown, f"Give --batch-size {max(1, options.batch_size // 2)} or less.")
    return ok("memory of a batch", shown)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _random_crops(captioner: Captioner, count: int) -> list[Pixels]:
    rng = np.random.default_rng(0)
    crop = captioner.crop_plan.crop(make_photo())
    return [replace(crop, vision=rng.integers(0, 256, crop.vision.shape, dtype=np.uint8)) for _ in range(count)]


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Gives a list that holds, when the block has ended, the most memory that it took beyond what was taken before.

    It stays empty where the system does not say how much that is.
    """
    taken: list[int] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield taken
        taken.append(torch.cuda.max_memory_reserved(device) - before)
    else:
        return_freed_memory()  # of the checks before this one, or the batch would take that first
        is_measured = _forget_peak()
        before = status_bytes("VmRSS") or 0
        yield taken
        if is_measured:
            taken.append(max(0, (status_bytes("VmHWM") or 0) - before))


def _forget_peak() -> bool:
    """Lets the system count the most memory of this process anew; returns whether it does, as Linux mostly does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
