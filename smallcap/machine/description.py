"""Describes what figures were measured on: the machine, its software, and the commit of the source."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_FAISS_PACKAGES = ("faiss-gpu-cuvs", "faiss-gpu", "faiss-cpu")
_PACKAGES = ("smallcap", "torch", "faiss-gpu", "faiss-cpu", "numpy", "pyarrow", "ray")


def describe_machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Returns the processor or GPU, the threads used, the machine's cores, versions and the commit."""
    return {
        "device": _device_name(device),
        "threads": threads,
        "cores_there": os.cpu_count(),
        "python": platform.python_version(),
        **{package: installed for package in _PACKAGES if (installed := _version(package))},
        "commit": source_commit(),
    }


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_commit() -> str:
    """Returns the repository's commit, with a `+` if files differ from it; empty outside a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe_cuda() -> dict[str, Any]:
    """Returns what a search on a GPU would run on, read without starting CUDA.

    Returns:
        `torch`, its version; `torch_cuda`, the version of CUDA that it was built for, or None; `faiss_package`, the
        distribution that gives `import faiss`, or None; `faiss`, its version; `faiss_gpu`, whether it has GPU indexes.
    """
    import torch  # before faiss

    package = next((name for name in _FAISS_PACKAGES if _version(name)), None)
    try:
        import faiss

        has_gpu_indexes = hasattr(faiss, "StandardGpuResources")
    except ImportError:
        package, has_gpu_indexes = None, False
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "faiss_package": package,
        "faiss": _version(package) if package else None,
        "faiss_gpu": has_gpu_indexes,
    }
