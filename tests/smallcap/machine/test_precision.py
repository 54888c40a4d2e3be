"""Which precision is chosen, and that float32 is float32."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from smallcap.errors import ConfigError
from smallcap.machine.cpu_precision import cpu_precision
from smallcap.machine.precision import find_device, keep_float32_exact, resolve_dtype
from tests.pretended_cuda.torch_cuda import restore_kernels


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_auto_takes_no_emulated_bfloat16(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert resolve_dtype("auto", "cuda") == expected
    assert resolve_dtype("bfloat16", "cuda") == "bfloat16"
    assert resolve_dtype("float32", "cuda:1") == "float32"


def test_auto_on_a_cpu_is_what_this_machine_keeps(tmp_path: Path) -> None:
    assert resolve_dtype("float16", "cpu", str(tmp_path)) == "float16"
    assert not list(tmp_path.iterdir())
    assert resolve_dtype("auto", "cpu", str(tmp_path)) == cpu_precision(str(tmp_path)).dtype


def test_a_device_is_one_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    for name in ("gpu", "banana", "auto", "", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", "cuda:99999", "meta"):
        with pytest.raises(ConfigError, match=r"no such device(.|\n)*cpu, cuda or cuda:N"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"cannot use this GPU here(.|\n)*expected: cpu\n(.|\n)*smallcap doctor"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [find_device(name).index for name in ("cuda", "cuda:0", "cuda:1")] == [None, 0, 1]
    with pytest.raises(ConfigError, match="one of 2 GPUs"):
        find_device("cuda:2")


def tf32() -> tuple[bool, bool, str]:
    """Returns where TF32 is on; torch raises if its switches contradict each other."""
    return (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    restore_kernels()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("before", ["nothing", "all of torch", "products", "convolutions"])
def test_float32_is_exact_whatever_was_set_before(before: str) -> None:
    if before == "all of torch":
        torch.backends.fp32_precision = "tf32"
    elif before == "products":
        torch.set_float32_matmul_precision("high")
    elif before == "convolutions":
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    keep_float32_exact(torch.float32, torch.device("cuda"))
    assert tf32() == (False, False, "ieee")


@pytest.mark.usefixtures("restored")
def test_other_models_leave_the_switches_alone() -> None:
    torch.backends.cudnn.allow_tf32 = True
    for dtype, device in ((torch.bfloat16, "cuda"), (torch.float16, "cuda"), (torch.float32, "cpu")):
        keep_float32_exact(dtype, torch.device(device))
    assert torch.backends.cudnn.allow_tf32
