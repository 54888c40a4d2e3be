"""Describes what figures were measured on: the machine, its software, and the commit of the source."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
