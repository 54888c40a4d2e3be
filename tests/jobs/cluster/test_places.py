"""A place is named by its node, and by its GPU as far as nvidia-smi, here a script, knows it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.cluster.places import this_place


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ('echo "NVIDIA L4, GPU-5f4d ($1)"', "GPU 3 (NVIDIA L4, GPU-5f4d (--id=3))"),
        ('echo "Unable to determine the device handle: GPU is lost"; exit 15', "GPU 3"),
        (None, "GPU 3"),
    ],
)
def test_a_gpu_is_named_as_far_as_it_answers(
    script: str | None, gpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(get_node_id=lambda: "ab", get_accelerator_ids=lambda: {"GPU": ["3"]})
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-7")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    place = this_place()
    assert (place.node_id, place.text) == ("ab", f"node gpu-7 (10.0.0.7), {gpus}")
