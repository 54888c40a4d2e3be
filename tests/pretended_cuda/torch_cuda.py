"""Puts the pretended device in CUDA's place: everything of torch that asks for a GPU gets an answer from it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.cuda._utils import _get_device_index

from tests.pretended_cuda import graphs
from tests.pretended_cuda.backward import run_backward
from tests.pretended_cuda.device import OnCuda, PretendedCuda
from tests.pretended_cuda.streams import Event

NAME = "pretended GPU"
GIB = 1 << 30
_attention = F.scaled_dot_product_attention
_tolist = Tensor.tolist
_engine = torch.autograd._engine_run_backward


@contextmanager
def pretended_cuda(total_bytes: int = 80 * GIB, cards: int = 1) -> Iterator[PretendedCuda]:
    """Pretends GPUs until the block ends, in this thread and in those that start meanwhile.

    Args:
        total_bytes: The memory of all GPUs together; `torch.OutOfMemoryError` is raised where tensors would need more.
        cards: The number of GPUs.
    """
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing, where there is no real GPU
    cuda = PretendedCuda(total_bytes, cards)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, stand_in in _stand_ins(cuda).items():
            monkeypatch.setattr(f"torch.{name}", stand_in)
        # `module.to("cuda")` makes new parameters: a CPU parameter cannot become another kind of tensor.
        monkeypatch.setattr("torch.__future__._overwrite_module_params_on_conversion", True)
        _catch_threads(cuda, monkeypatch)
        try:
            with cuda.operations():
                yield cuda
        finally:
            restore_kernels()  # a model on a GPU changes them for the whole process
    cuda.is_pretended = False


def restore_kernels() -> None:
    """Sets torch's switches for TF32 and cuDNN's attention as they are when it is imported."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def _stand_ins(cuda: PretendedCuda) -> dict[str, Any]:
    """Returns what takes the place of torch's functions and classes."""
    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=cuda.order.total_bytes)
    stand_ins = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda *_, **__: None,
        "manual_seed_all": lambda seed: None,
        "device_count": lambda: len(cuda.order.defaults),
        "current_device": cuda.current_device,
        "set_device": cuda.set_device,
        "device": cuda.on_device,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (
            cuda.order.total_bytes - cuda.order.allocated_bytes,
            cuda.order.total_bytes,
        ),
        "memory_allocated": lambda device=None: cuda.order.allocated_bytes,
        "get_per_process_memory_fraction": _whole_card,
        "max_memory_reserved": lambda device=None: cuda.order.allocated_bytes,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: (cuda.note("synchronize"), cuda.order.synchronize()),
        "Stream": cuda.new_stream,
        "Event": lambda **_: Event(cuda),
        "stream": cuda.on_stream,
        "set_stream": cuda.set_stream,
        "current_stream": cuda.current_stream,
        "default_stream": cuda.default_stream,
        "CUDAGraph": lambda keep_graph=False: graphs.CUDAGraph(cuda),
        "graph": partial(graphs.capturing, cuda),
        "graph_pool_handle": graphs.new_pool,
        "is_current_stream_capturing": cuda.is_capturing,
    }
    return {f"cuda.{name}": stand_in for name, stand_in in stand_ins.items()} | {
        "autograd._engine_run_backward": _run_backward,
        "nn.functional.scaled_dot_product_attention": partial(_attend, cuda),
        "Tensor.pin_memory": lambda tensor, device=None: cuda.pin(tensor.clone()),
        "Tensor.is_pinned": lambda tensor, device=None: cuda.is_pinned(tensor),
        "Tensor.record_stream": lambda tensor, stream: tensor.memory.kept_for.add(stream.queue),
        "Tensor.tolist": lambda tensor: _tolist(tensor.cpu() if isinstance(tensor, OnCuda) else tensor),
    }


def _whole_card(device: torch.device | int | None = None) -> float:
    """Says that a process is not limited to a share of the GPU; a device without a number is refused, as torch does."""
    _get_device_index(0 if device is None else device)
    return 1.0


def _catch_threads(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every new thread, whoever starts it, live on the pretended device."""
    run = threading.Thread.run

    def run_on_cuda(thread: threading.Thread) -> None:
        with cuda.operations():
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", run_on_cuda)


def _run_backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor], *arguments: Any, **options: Any) -> Any:
    if any(isinstance(output, OnCuda) for output in outputs):
        return run_backward(outputs, gradients)
    return _engine(outputs, gradients, *arguments, **options)


def _attend(
    cuda: PretendedCuda,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attends with one kernel, as a GPU does; torch itself would look for the kernel among those of a real GPU."""
    tensors = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
    if not any(isinstance(tensor, OnCuda) for tensor in tensors):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    shapes = [query.shape, key.shape, *([] if attn_mask is None else [attn_mask.shape])]
    cuda.attention_shapes[tuple(map(tuple, shapes))] += 1
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    if dropout_p:
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
