"""Says where a process runs, in words with which a person finds the machine and the GPU."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import dataclass

_ANSWER_S = 20.0  # a GPU that has failed may never answer


@dataclass(frozen=True)
class Place:
    """Where a process of the cluster runs."""

    node_id: str  # Ray's
    text: str  # such as `node gpu-3 (10.0.0.7), GPU 0 (NVIDIA L4, GPU-5f…)`


def this_place() -> Place:
    """Returns where this task or actor runs; its GPUs are named as far as nvidia-smi knows them."""
    import ray

    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    node = f"node {socket.gethostname()} ({ray.util.get_node_ip_address()})"
    return Place(context.get_node_id(), ", ".join([node, *map(_describe_gpu, gpus)]))


def _describe_gpu(number: str) -> str:
    """Describes a GPU without a CUDA context, which this process may not get, and which a fault would end."""
    query = ["nvidia-smi", f"--id={number}", "--query-gpu=name,uuid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"GPU {number}"
    return f"GPU {number} ({answer.stdout.strip()})"
