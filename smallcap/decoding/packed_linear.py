"""Linear layers whose weights are laid out once as the CPU's matrix kernels expect them.

torch lays a bfloat16 weight out anew at every call. For the few rows of a decoding step, that takes up to 28% of the
time (docs/benchmarks.md). `torch.compile` with freezing avoids it; this module does the same without a compiler. The
operators are torch's own but undocumented, so a model stays as it is if they are missing.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

_FUSED = {"GELU": "gelu", "ReLU": "relu"}  # activations that the kernels compute before they round


class PackedLinear(nn.Module):
    """A linear layer with the activation that follows it, for inference.

    Args:
        weight: [out, in] bfloat16.
        bias: [out] bfloat16.
        activation: An activation that can be fused, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach()
        self._activation = "none" if activation is None else _FUSED[type(activation).__name__]
        self._algorithm = activation.approximate if isinstance(activation, nn.GELU) else ""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, self._activation, [], self._algorithm
        )
        return packed


def can_pack(model: nn.Module) -> bool:
    """Says whether a model's linear layers can be packed: they are bfloat16, and the CPU and torch can do it.

    Without AVX-512 the operators exist but refuse bfloat16.
    """
    weight = next(model.parameters())
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(model: nn.Module) -> bool:
    """Packs a model's linear layers in place if possible; the model can then not be saved, moved or trained.

    Returns:
        Whether the layers were packed.
    """
    if not can_pack(model):
        return False
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            is_conv1d = type(layer).__name__ == "Conv1D"  # GPT-2's, with an [in, out] weight
            if type(layer) is not nn.Linear and not is_conv1d:  # subclasses belong to modules that use the weight
                continue
            weight, bias = (cast("Tensor", parameter) for parameter in (layer.weight, layer.bias))
            fused = _activation_after(module, name)
            activation = getattr(module, fused) if fused else None
            setattr(module, name, PackedLinear(weight.T if is_conv1d else weight, bias, activation))
            if fused:
                setattr(module, fused, nn.Identity())
    return True


def _activation_after(module: nn.Module, name: str) -> str | None:
    """Returns the name of the activation that a block applies to its linear layer `name`, if it can be fused."""
    if name in ("c_fc", "fc1"):
        for attribute in ("activation", "activation_fn"):
            if type(getattr(module, attribute, None)).__name__ in _FUSED:
                return attribute
    return None
