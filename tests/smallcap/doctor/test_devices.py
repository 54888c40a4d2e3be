from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smallcap.doctor import devices
from smallcap.doctor.devices import (
    check_architecture,
    check_combination,
    check_devices,
    check_driver,
    check_dtype,
    covers,
    query_driver,
)
from smallcap.doctor.report import ok

REPORT = """<?xml version="1.0"?><nvidia_smi_log><driver_version>580.1</driver_version><cuda_version>13.0</cuda_version>
<gpu id="0"><product_name>Card</product_name></gpu>
<gpu id="1"><product_name>Card</product_name></gpu></nvidia_smi_log>"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """A function that installs a driver which reports a text and exits with a status."""

    def install(text: str, status: int) -> None:
        (tmp_path / "text").write_text(text)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path}/text\nexit {status}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_sound_unless_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "query_driver", lambda: None)
    monkeypatch.setattr(devices, "check_combination", lambda found: ok("cuda", "has a test of its own"))
    assert [(finding.subject, finding.status) for finding in check_devices("auto")] == [
        ("gpu driver", "ok"),
        ("cuda", "ok"),
        ("dtype", "ok"),
    ]
    first, _ = check_devices("cuda")
    assert (first.status, first.found) == ("fail", "no NVIDIA driver here")


def test_a_driver_that_torch_cannot_use_is_a_failure(driver: Callable[[str, int], None]) -> None:
    driver(REPORT, 0)
    assert query_driver() == "580.1 (CUDA up to 13.0), 2 × Card"
    assert check_driver(query_driver(), is_usable=True, wanted="auto").status == "ok"
    assert check_driver(query_driver(), is_usable=False, wanted="cpu").status == "ok"
    finding = check_driver(query_driver(), is_usable=False, wanted="auto")
    assert (finding.status, "Update the driver" in finding.remedy) == ("fail", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_broken_driver_is_a_failure(driver: Callable[[str, int], None]) -> None:
    driver("Driver/library version mismatch", 18)
    first, *_ = check_devices("auto")
    assert (first.status, first.found) == ("fail", "RuntimeError: nvidia-smi: Driver/library version mismatch")


@pytest.mark.parametrize(
    ("built", "capability", "expected"),
    [
        (["sm_75", "sm_80"], (8, 9), True),
        (["sm_75", "sm_80"], (9, 0), False),
        (["sm_75", "compute_80"], (9, 0), True),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100", "sm_120"], (12, 0), True),
        (["compute_90"], (8, 0), False),
        ([], (8, 0), False),
    ],
)
def test_code_for_an_architecture_runs_on(built: list[str], capability: tuple[int, int], expected: bool) -> None:
    assert covers(built, capability) is expected


@pytest.mark.parametrize(
    ("built", "of_faiss", "status"),
    [
        (["sm_80", "sm_90"], {"sm_90"}, "ok"),
        (["sm_80", "sm_90"], {"compute_80"}, "ok"),
        (["sm_80", "sm_90"], set(), "ok"),  # a faiss for CPUs
        (["sm_80", "sm_90"], {"sm_75"}, "warn"),
        (["sm_75"], {"sm_90"}, "fail"),
    ],
)
def test_a_gpu_without_code_for_it_is_a_failure(
    built: list[str], of_faiss: set[str], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (100 << 30, 140 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Card")
    finding = check_architecture(0, of_faiss)
    assert finding.status == status
    assert "Card, capability 9.0, 107.4 GB of 150.3 GB free" in finding.found


@pytest.mark.parametrize(
    ("torch_cuda", "faiss_cuda", "packages", "status"),
    [
        ("13.2", "13.2.86", ["faiss-gpu-cuvs"], "ok"),
        ("13.2", None, ["faiss-cpu"], "ok"),
        (None, None, ["faiss-cpu"], "ok"),
        (None, None, [], "ok"),
        (None, "13.2.86", ["faiss-gpu-cuvs"], "warn"),
        ("13.2", "12.6.77", ["faiss-gpu"], "fail"),
        ("13.2", "13.2.86", ["faiss-gpu-cuvs", "faiss-cpu"], "fail"),
    ],
)
def test_the_combination_of_torch_and_faiss(
    torch_cuda: str | None, faiss_cuda: str | None, packages: list[str], status: str
) -> None:
    found = {"torch": "2.15", "torch_cuda": torch_cuda, "faiss_cuda": faiss_cuda, "faiss_gpu": faiss_cuda is not None}
    finding = check_combination(found | {"faiss": dict.fromkeys(packages, "1.15.1")})
    assert finding.status == status
    assert " and ".join(f"{package} 1.15.1" for package in packages) in finding.found
    assert (torch_cuda or "for CPUs") in finding.found


def test_imitated_bfloat16_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "matrix_rate", lambda dtype: 1e9 if dtype == torch.bfloat16 else 1e11)
    monkeypatch.setattr(devices, "resolve_dtype", lambda dtype, device: "float32")
    finding = check_dtype("cpu")
    assert (finding.status, "in bfloat16 at 0.01 times that; this processor imitates" in finding.found) == (
        "warn",
        True,
    )


@pytest.mark.parametrize(
    ("is_native", "found"),
    [
        (True, "auto takes bfloat16 on this GPU"),
        (False, "auto takes float16 on this GPU, which only imitates bfloat16"),
    ],
)
def test_a_gpus_precision_is_named_with_its_reason(
    is_native: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_native or including_emulation)
    assert check_dtype("cuda") == ok("dtype", found)
