"""Describes what figures were measured on: the machine, its software, and the commit of the source."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

FAISS_PACKAGES = ("faiss-gpu-cuvs", "faiss-gpu", "faiss-cpu")  # each has the module `faiss`
_PACKAGES = ("smallcap", "torch", *FAISS_PACKAGES, "numpy", "pyarrow", "ray")


def describe_machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Returns the processor or GPU, the threads used, the machine's cores, versions and the commit."""
    return {
        "device": _device_name(device),
        "threads": threads,
        "cores_there": os.cpu_count(),
        "python": platform.python_version(),
        **installed_versions(_PACKAGES),
        "commit": source_commit(),
    }


def describe_cuda() -> dict[str, Any]:
    """Returns which CUDA torch and faiss bring, without starting it; they work together when both have the same.

    Returns:
        `torch` and `torch_cuda`, its versions (`torch_cuda` is None without CUDA); `faiss`, the version of each
        installed faiss package, of which there should be one; `faiss_cuda`, the CUDA runtime that these packages bring
        (None without CUDA); `faiss_gpu`, whether the imported faiss has indexes for GPUs.
    """
    import faiss
    import torch

    packages = installed_versions(FAISS_PACKAGES)
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "faiss": packages,
        "faiss_cuda": next(filter(None, map(_cuda_runtime_of, packages)), None),
        "faiss_gpu": hasattr(faiss, "StandardGpuResources"),
    }


def _cuda_runtime_of(package: str) -> str | None:
    """Returns the version of the CUDA runtime among a package's requirements."""
    named = re.search(r"nvidia-cuda-runtime(-cu\d+)?", " ".join(requires(package) or []))
    return installed_versions([named[0]]).get(named[0]) if named else None


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def installed_versions(packages: Iterable[str], find: Callable[[str], str] = version) -> dict[str, str]:
    """Returns the versions of those of the packages that are installed.

    Args:
        packages: Their names.
        find: Returns a package's version, or raises `PackageNotFoundError`.
    """
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = find(name)
    return found


def source_commit() -> str:
    """Returns the repository's commit, with a `+` if files differ from it; empty outside a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
