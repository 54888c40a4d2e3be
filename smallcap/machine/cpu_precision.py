"""The precision that `auto` means on this CPU: measured once, and kept below the cache folder.

Precision decides captions at near ties. Measured anew for every run, it would follow whatever else the machine does.
torch is imported only where there is something to measure.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from smallcap import storage
from smallcap.errors import SchemaError, StorageError
from smallcap.phrasing import describe_count
from smallcap.records import VersionedRecord, parse_record

_SHAPE = (512, 768, 3072)  # rows, in, out: a feed-forward layer of GPT-2 over some prompts
_LEAST_GAIN = 1.3  # speed-up of bfloat16 over float32 that justifies its rounding
_PROBE_ROWS = 16  # enough to see that a machine emulates bfloat16, which can be a hundred times slower than float32
_EMULATED = 0.5  # speed-up in the probe that shows emulation, or less
_SECONDS, _WARM_UPS = 0.5, 2  # of measuring, and how many products come before
_FOLDER = "precision"


class CpuPrecision(VersionedRecord):
    """What a measurement found."""

    format_version: Literal[1] = 1
    dtype: Literal["float32", "bfloat16"]
    gain: float  # speed of bfloat16 over that of float32
    measured_on: str  # the date, UTC
    machine: dict[str, str | int]  # what it holds for

    def describe(self) -> str:
        """Returns the precision, and in words for people why it is chosen."""
        than = "as fast as float32" if self.dtype == "bfloat16" else "as fast, so that its rounding gains too little"
        whom = "it is" if self.dtype == "bfloat16" else "bfloat16 is"
        cores = describe_count(int(self.machine["cores"]), "core")
        return (
            f"{self.dtype}; {whom} {self.gain:.2g} times {than}, measured on {self.measured_on} on "
            f"{self.machine['cpu']} with {cores}"
        )


def cpu_precision(cache_dir: str = storage.DEFAULT_CACHE_DIR) -> CpuPrecision:
    """Returns the precision that is kept for this machine; measures and keeps it where there is none.

    Of processes that measure at the same time, the first one's result holds for all. A file that is damaged, or not of
    this machine, is replaced. Where the folder cannot be written, nothing is kept.

    Args:
        cache_dir: This machine's cache folder.
    """
    machine = describe_cpu()
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir).expanduser() / _FOLDER / f"{digest[:16]}.json"
    found = _parse(path.read_bytes(), path, machine) if path.is_file() else None
    if found is None:
        found = _measure(machine)
        with suppress(StorageError):  # the measurement is good for this run all the same
            found = _keep(found, path)
    return found


def describe_cpu() -> dict[str, str | int]:
    """Returns what a measurement depends on: processor, instructions, cores, torch, and what is measured."""
    facts: dict[str, str] = {}
    with suppress(OSError):  # only Linux has it
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    flags = " ".join(sorted((facts.get("flags") or facts.get("Features") or "").split()))
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "flags_sha256": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1,
        "torch": version("torch"),
        "product": "x".join(map(str, _SHAPE)),
    }


def _parse(data: bytes, path: Path, machine: dict[str, str | int]) -> CpuPrecision | None:
    """Returns what is kept in a file; None where it is damaged, or not of this machine."""
    try:
        kept = parse_record(CpuPrecision, data, str(path), SchemaError)
    except SchemaError:
        return None
    return kept if kept.machine == machine else None


def _keep(measured: CpuPrecision, path: Path) -> CpuPrecision:
    """Writes a measurement, unless another process was earlier; returns what is kept.

    Raises:
        StorageError: The folder cannot be written.
    """
    kept = measured

    def keep_first(data: bytes | None) -> bytes:
        nonlocal kept
        kept = (data and _parse(data, path, measured.machine)) or measured
        return kept.to_json().encode()

    storage.update_bytes(str(path), keep_first)
    return kept


def _measure(machine: dict[str, str | int]) -> CpuPrecision:
    gain = _gain(_PROBE_ROWS)
    if gain > _EMULATED:
        gain = _gain(_SHAPE[0])
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if gain >= _LEAST_GAIN else "float32"
    today = time.strftime("%Y-%m-%d", time.gmtime())
    return CpuPrecision(dtype=dtype, gain=round(gain, 3), measured_on=today, machine=machine)


def _gain(rows: int) -> float:
    """Returns how much faster a product of this many rows is in bfloat16 than in float32.

    Both are measured in turns, by the CPU time of this thread, and by their best: other processes change that least.
    """
    import torch

    _, inner, columns = _SHAPE
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    factors = {dtype: (left.to(dtype), right.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(factors, float("inf"))
    end, rounds = time.monotonic() + _SECONDS, 0
    with torch.inference_mode():
        while time.monotonic() < end or rounds <= _WARM_UPS:
            for dtype, (some, weights) in factors.items():
                start = time.thread_time()
                torch.nn.functional.linear(some, weights)
                if rounds >= _WARM_UPS:
                    best[dtype] = min(best[dtype], time.thread_time() - start)
            rounds += 1
    return best[torch.float32] / best[torch.bfloat16]
