"""Which precision a machine computes in, and with which kernels."""

from __future__ import annotations

import re
import time
from typing import Any, cast

import torch
from torch import Tensor

from smallcap.errors import ConfigError
from smallcap.machine.cpu_precision import cpu_precision
from smallcap.machine.gpu import on_device
from smallcap.storage import DEFAULT_CACHE_DIR

_ROWS, _IN, _OUT = 512, 768, 3072  # a feed-forward layer of GPT-2 over some prompts


def float32_products(first: Tensor, second: Tensor) -> Tensor:
    """Multiplies matrices of any precision into float32: [M, K] by [K, N], or [B, M, K] by [B, K, N].

    A GPU adds half precision up in float32 anyway, and a result in half precision would lose the order of close values.
    """
    if first.dtype == torch.float32 or not first.is_cuda:
        return first.to(torch.float32) @ second.to(torch.float32)
    multiply: Any = torch.mm if first.dim() == 2 else torch.bmm
    return cast("Tensor", multiply(first, second, out_dtype=torch.float32))


def matrix_rate(
    dtype: torch.dtype, device: str = "cpu", shape: tuple[int, int, int] = (_ROWS, _IN, _OUT), seconds: float = 0.1
) -> float:
    """Measures how fast the device multiplies matrices: the best of many runs, as other processes only slow them.

    Args:
        dtype: Data type of both matrices.
        device: A torch device.
        shape: (m, k, n) of an [m, k] by [k, n] product.
        seconds: How long to measure.

    Returns:
        FLOP/s, a multiplication and an addition counted as two.
    """
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    best, spent, warm_ups = float("inf"), 0.0, 2
    with torch.inference_mode():
        while spent < seconds or warm_ups >= 0:
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)
            if left.is_cuda:
                torch.cuda.synchronize(left.device)
            elapsed = time.perf_counter() - start
            warm_ups -= 1
            if warm_ups < 0:
                best, spent = min(best, elapsed), spent + elapsed
    return 2 * rows * inner * columns / best


def find_device(name: str) -> torch.device:
    """Returns the torch device of a name.

    Args:
        name: `cpu`, `cuda`, or `cuda:N` for the GPU of that number.

    Raises:
        ConfigError: The name is another one, or torch cannot use such a GPU here.
    """
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    if match is None:
        raise ConfigError("There is no such device.", where="device", expected="cpu, cuda or cuda:N", found=repr(name))
    if name == "cpu":
        return torch.device(name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1] or 0) >= gpus:
        raise ConfigError(
            "torch cannot use this GPU here.",
            where=f"device {name}",
            expected=f"cpu, or one of {gpus} GPUs, counted from cuda:0" if gpus else "cpu",
            found=f"GPUs that torch {torch.__version__} can use: {gpus}",
            remedy="Use device cpu, or look with smallcap doctor why the GPU is not found.",
        )
    return torch.device(name)


def resolve_device(device: str) -> str:
    """Returns what was asked for, or, for `auto`, `cuda` if torch can use a GPU, else `cpu`."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str, cache_dir: str = DEFAULT_CACHE_DIR) -> str:
    """Returns the name of a torch dtype: what was asked for, or, for `auto`, what suits the device, which must be here.

    GPUs before Ampere, as the T4 is, only emulate bfloat16; float16 is fast on all of them. The fastest precision of a
    CPU is measured, because a supported data type may be emulated.

    Args:
        dtype: A name, or `auto`.
        device: `cpu`, `cuda` or `cuda:N`.
        cache_dir: Where this machine keeps the measurement of its CPU.

    Raises:
        ConfigError: The device is not here.
    """
    if dtype != "auto":
        return dtype
    found = find_device(device)
    if found.type == "cpu":
        return cpu_precision(cache_dir).dtype
    with on_device(found):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def choose_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """Switches off, in the whole process, what a model on a GPU must not meet: TF32 in float32, and cuDNN's attention.

    torch prefers cuDNN's attention on Hopper and Blackwell. It makes a plan for each new shape, in each thread, and
    keeps it for ever; decoding meets new shapes at every step. The other kernels for attention need no plans.
    """
    keep_float32_exact(dtype, device)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def keep_float32_exact(dtype: torch.dtype, device: torch.device) -> None:
    """Switches TF32 off for the whole process if a float32 model goes to a GPU; torch leaves it on for convolutions.

    TF32 rounds factors to 10 bits, so that captions in float32 would differ from a CPU's. Whoever computes in TF32 in
    the same process must switch it on again. Models in half precision are not concerned.
    """
    if dtype == torch.float32 and device.type == "cuda":
        # The older switches come first: they and those of each operation must agree, or torch refuses to compute.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
