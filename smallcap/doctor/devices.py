"""Checks the GPU's driver, what torch and faiss were built for, and which precision suits the device."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from smallcap.config import Device
from smallcap.doctor.fatbins import architectures_of
from smallcap.doctor.report import Finding, attempt, fail, ok, warn
from smallcap.machine.description import describe_cuda
from smallcap.machine.precision import matrix_rate, resolve_device, resolve_dtype
from smallcap.phrasing import describe_count, describe_gb

_DRIVER_S = 20.0  # for nvidia-smi, which takes seconds where many GPUs wake up
_EMULATED = 0.5  # rate of bfloat16 over float32 of a machine that has no instructions for it, or less


def check_devices(wanted: Device) -> Iterator[Finding]:
    """Looks at GPUs, at the packages that use them, and at the device's precisions."""
    driver = "Install NVIDIA's driver, or run `nvidia-smi` to see what ails it."
    yield from attempt("gpu driver", lambda: [check_driver(query_driver(), torch.cuda.is_available(), wanted)], driver)
    cuda = "Install torch and faiss again, with constraints.txt."
    yield from attempt("cuda", lambda: [check_combination(describe_cuda())], cuda)
    if torch.cuda.is_available():
        of_faiss = faiss_architectures()
        for number in range(torch.cuda.device_count()):
            yield from attempt(f"gpu {number}", lambda number=number: [check_architecture(number, of_faiss)], driver)  # type: ignore[misc]
    device = resolve_device(wanted)
    if device == "cuda" and not torch.cuda.is_available():
        return  # the driver's line says so
    remedy = "Say a precision (--dtype float32)." if device == "cpu" else driver
    yield from attempt("dtype", lambda: [check_dtype(device)], remedy)


def query_driver() -> str | None:
    """Returns what nvidia-smi says in one line; None without an NVIDIA driver.

    Raises:
        RuntimeError: There is an nvidia-smi, and it fails.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=_DRIVER_S, check=False)
    if asked.returncode:
        raise RuntimeError(f"nvidia-smi: {asked.stdout.strip() or asked.stderr.strip()}")
    log = ElementTree.fromstring(asked.stdout)
    names = [gpu.findtext("product_name", "?") for gpu in log.iter("gpu")]
    gpus = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "no GPU"
    return f"{log.findtext('driver_version', '?')} (CUDA up to {log.findtext('cuda_version', '?')}), {gpus}"


def check_driver(driver: str | None, is_usable: bool, wanted: Device) -> Finding:
    """Compares what the driver says with what torch can use.

    Args:
        driver: `query_driver`'s answer.
        is_usable: Whether torch finds a GPU.
        wanted: The device that was asked for.
    """
    if is_usable:
        return ok("gpu driver", driver or "torch finds a GPU; there is no nvidia-smi here")
    if driver is not None and wanted != "cpu":
        return fail(
            "gpu driver",
            f"{driver}; torch {torch.__version__} cannot use it",
            "Update the driver to one for torch's CUDA, or install a torch for the driver's; in a container, give it "
            "the GPUs.",
        )
    if wanted == "cuda":
        return fail("gpu driver", "no NVIDIA driver here", "Install the driver, or leave the device at auto.")
    return ok("gpu driver", driver or "none, so captioning runs on the CPU")


def check_combination(found: dict[str, Any]) -> Finding:
    """Says which torch and which faiss meet in a process, and whether on the same CUDA.

    Args:
        found: As `smallcap.machine.description.describe_cuda` returns it.
    """
    packages, torch_cuda, faiss_cuda = found["faiss"], found["torch_cuda"], found["faiss_cuda"]
    faiss = " and ".join(f"{name} {version}" for name, version in packages.items()) or "faiss of no known package"
    of_faiss = [f"CUDA {faiss_cuda}"] if faiss_cuda else []
    of_faiss.append("with GPU indexes" if found["faiss_gpu"] else "without GPU indexes")
    of_torch = f"CUDA {torch_cuda}" if torch_cuda else "for CPUs"
    named = f"torch {found['torch']} ({of_torch}), {faiss} ({', '.join(of_faiss)})"
    remedy = f"Remove {', '.join(packages)}; then pip install 'faiss-gpu-cuvs', with constraints.txt."
    if len(packages) > 1:
        return fail("cuda", f"{named}: each overwrites the others' files", remedy)
    if torch_cuda and faiss_cuda and torch_cuda.partition(".")[0] != faiss_cuda.partition(".")[0]:
        return fail("cuda", f"{named}: two CUDAs in one process", remedy)
    if found["faiss_gpu"] and not torch_cuda:
        return warn("cuda", named, "This torch uses no GPU: install its CUDA build to caption on one.")
    return ok("cuda", named)


def faiss_architectures() -> set[str]:
    """Returns the architectures for which the installed faiss holds code; none where it has no GPU indexes."""
    import faiss

    libraries = Path(faiss.__file__).parent.glob("*.so")
    return {architecture for library in libraries for architecture in architectures_of(library)}


def check_architecture(number: int, of_faiss: Collection[str]) -> Finding:
    """Checks that torch and faiss hold code for a GPU, and shows the GPU's memory.

    Args:
        number: The GPU's number.
        of_faiss: As `faiss_architectures` returns them.
    """
    major, minor = torch.cuda.get_device_capability(number)
    built = torch.cuda.get_arch_list()
    free, total = torch.cuda.mem_get_info(number)
    name = torch.cuda.get_device_name(number)
    shown = f"{name}, capability {major}.{minor}, {describe_gb(free)} of {describe_gb(total)} free"
    if not covers(built, (major, minor)):
        return fail(
            f"gpu {number}",
            f"{shown}; torch has code for {', '.join(built) or 'no GPU'}",
            "Install a torch that was built for this GPU.",
        )
    if of_faiss and not covers(of_faiss, (major, minor)):
        return warn(
            f"gpu {number}",
            f"{shown}; faiss has code for {', '.join(sorted(of_faiss))}",
            "Install a faiss that was built for this GPU. Without one, an index that is too large for an exact search "
            "there is searched on the CPU.",
        )
    return ok(f"gpu {number}", shown)


def covers(built: Collection[str], capability: tuple[int, int]) -> bool:
    """Says whether code for some architectures runs on a GPU.

    Code of `sm_80` runs on 8.0 and later minor versions of 8; `compute_80` is compiled for any later GPU when it is
    loaded. A suffix (`sm_90a`) ties code to exactly that capability.
    """
    for kind, number, suffix in (match.groups() for match in map(_ARCHITECTURE.fullmatch, built) if match):
        has = (int(number[:-1]), int(number[-1]))
        if suffix:
            fits = has == capability
        elif kind == "compute":
            fits = has <= capability
        else:
            fits = has[0] == capability[0] and has[1] <= capability[1]
        if fits:
            return True
    return False


_ARCHITECTURE = re.compile(r"(sm|compute)_(\d{2,3})([a-z]?)")


def check_dtype(device: str) -> Finding:
    """Says which precision `auto` takes for captioning on a device, and why; warns of a CPU that imitates bfloat16."""
    chosen = resolve_dtype("auto", device)
    if device != "cpu":
        reason = "" if chosen == "bfloat16" else ", which only imitates bfloat16"
        return ok("dtype", f"auto takes {chosen} on this GPU{reason}")
    rates = {name: matrix_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    gain = rates["bfloat16"] / rates["float32"]
    found = (
        f"auto takes {chosen}: with {describe_count(torch.get_num_threads(), 'thread')}, products in float32 run at "
        f"{rates['float32'] / 1e9:,.0f} GFLOP/s, in bfloat16 at {gain:.2g} times that"
    )
    if gain <= _EMULATED:
        return warn(
            "dtype", f"{found}; this processor imitates bfloat16", "Never ask for --dtype bfloat16 on this machine."
        )
    return ok("dtype", found)
