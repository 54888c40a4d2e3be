"""The interface of a text decoder with reduced cross-attention, and the attention all decoders share.

A decoder turns token ids into hidden states and hidden states into logits. It knows nothing about beams: the engine
lays an image's N beams along the S axis, where the prompt's tokens lie during prefill; one forward pass serves both.
Each decoder of the reference is one small module (`gpt2`, `opt`, `xglm`) with the reference's parameter names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smallcap.decoding.kv_cache import KeyValueSlots
from smallcap.decoding.packed_linear import PackedLinear, pack_linears
from smallcap.machine.precision import float32_products
from smallcap.machine.shapes import row_on_gpu

_FEW_QUERIES = 16  # for which products are faster than fused attention on a GPU

CrossAttentionKV = list[tuple[Tensor, Tensor]]  # per layer: keys and values, each [B, H, P, D / reduce factor]


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder, under the same names for every kind."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    max_positions: int
    encoder_hidden_size: int
    cross_attention_reduce_factor: int
    layer_norm_eps: float
    activation: str
    dropout: float

    @property
    def head_dim(self) -> int:
        """D, the size of one head of self-attention."""
        return self.hidden_size // self.num_heads

    @property
    def cross_attention_size(self) -> int:
        """Size of the cross-attention's queries, keys and values over all heads."""
        return self.hidden_size // self.cross_attention_reduce_factor


class DecoderLayer(nn.Module, ABC):
    """Self-attention, cross-attention and feed-forward, each normalised before and added after."""

    @abstractmethod
    def project_image(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Projects [B, P, Hv] to cross-attention's keys and values, each [B, H, P, D / reduce factor]."""

    @abstractmethod
    def forward(
        self, x: Tensor, mask: Tensor, cross_kv: tuple[Tensor, Tensor], layer: int, cache: KeyValueSlots | None
    ) -> Tensor:
        """Maps [B, S, E] and a mask [B, 1, Q, T] to the last Q positions, [B, Q, E]."""


class DecoderStack(nn.Module, ABC):
    """Embeddings, layers and last norm of a decoder: everything except its output layer."""

    @property
    @abstractmethod
    def decoder_layers(self) -> Sequence[DecoderLayer]:
        """The layers, first to last."""

    @property
    @abstractmethod
    def token_embedding(self) -> Tensor:
        """The input embedding, [V, E]."""

    @abstractmethod
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Maps [B, S] token ids and positions to [B, S, E]."""

    @abstractmethod
    def last_norm(self, x: Tensor) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""


class TextDecoder(nn.Module, ABC):
    """A causal language model whose layers also attend to an image's encoder hidden states.

    Attributes:
        trained_marker: Occurs in the names of the parameters that SmallCap trains; all others stay frozen.
    """

    trained_marker: str

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self._packed_head: PackedLinear | None = None  # the output layer as a CPU wants it
        self._padded_head: Tensor | None = None  # and as a GPU does, [V and more, E]

    @property
    @abstractmethod
    def stack(self) -> DecoderStack:
        """Everything except the output layer, whose weights are the input embedding's."""

    def cross_attention_kv(self, encoder_hidden_states: Tensor) -> CrossAttentionKV:
        """Projects [B, P, Hv] encoder hidden states to every layer's cross-attention keys and values."""
        projected = (layer.project_image(encoder_hidden_states) for layer in self.stack.decoder_layers)
        # contiguous: they are read once per generated token
        return [(keys.contiguous(), values.contiguous()) for keys, values in projected]

    def forward(
        self,
        input_ids: Tensor,  # [B, S] int64
        position_ids: Tensor,  # [B, S] int64, counted from 0 at the first real token
        attention_mask: Tensor,  # [B, 1, S, T], added to the attention scores: 0 or -inf
        cross_kv: CrossAttentionKV,
        cache: KeyValueSlots | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Returns the last layer's normalised hidden states, [B, S, E]; stores keys and values if there is a cache.

        With `last_only` it returns only those of the last position, [B, 1, E], and the last layer computes no others.
        """
        layers = self.stack.decoder_layers
        masks = [attention_mask] * len(layers)
        if last_only:
            masks[-1] = attention_mask[:, :, -1:]
        x = self.stack.embed(input_ids, position_ids)
        for number, layer in enumerate(layers):
            x = layer(x, masks[number], cross_kv[number], number, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.stack.last_norm(x)

    @property
    def token_embedding(self) -> Tensor:
        """The input embedding [V, E], which serves as the output embedding."""
        return self.stack.token_embedding

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Returns [..., V] logits of [..., E] hidden states.

        On a GPU those of a half-precision decoder are float32, as they are summed: rounded to bfloat16, most logits
        would be multiples of 0.25 or 0.5, and many would be equal. On a CPU they have the decoder's precision.
        """
        if self._packed_head is not None:
            return cast("Tensor", self._packed_head(hidden_states.contiguous()))
        weight = self.token_embedding
        if not weight.is_cuda or weight.dtype == torch.float32 or hidden_states.dtype != weight.dtype:
            return F.linear(hidden_states, weight)
        head = weight if self._padded_head is None else self._padded_head
        logits = float32_products(hidden_states.flatten(0, -2), head.T)[:, : len(weight)]
        return logits.view(*hidden_states.shape[:-1], -1)

    def pack(self) -> None:
        """Lays the weights out for this device if possible; the decoder can then only be used for inference."""
        weight = self.token_embedding
        if weight.is_cuda and weight.dtype != torch.float32:
            # GPT-2's 50,257 tokens are no multiple of 8: products with them would take six times as long.
            self._padded_head = F.pad(weight.detach(), (0, 0, 0, row_on_gpu(len(weight)) - len(weight)))
        elif pack_linears(self):
            self._packed_head = PackedLinear(weight, None)

    def cross_attention_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that SmallCap trains, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if self.trained_marker in name}


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps a tensor to one of its shape."""
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    """Returns an activation by its name in transformers.

    transformers computes `gelu_new` in seven operations; torch has the same function as one.
    """
    match name:
        case "gelu":
            return nn.GELU()
        case "gelu_new" | "gelu_pytorch_tanh":
            return nn.GELU("tanh")
        case "relu":
            return nn.ReLU()
        case "quick_gelu":
            return QuickGELU()
    from transformers.activations import ACT2FN  # which takes seconds to import

    return cast("nn.Module", ACT2FN[name])


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """Returns [B, S, H * D] as [B, H, S, D]."""
    batch, length, size = states.shape
    return states.view(batch, length, num_heads, size // num_heads).transpose(1, 2)


def init_weights(decoder: nn.Module) -> None:
    """Initialises weights as GPT-2 and fairseq do; only those of new cross-attention are not overwritten afterwards."""
    for module in decoder.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, nn.Parameter) and not isinstance(module, nn.LayerNorm):
            nn.init.normal_(weight, std=0.02)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)


def attend(
    queries: Tensor,  # [B, H, S, D]
    keys: Tensor,  # [B, H, T, D]
    values: Tensor,  # [B, H, T, D]
    mask: Tensor | None,  # added to the scores
    dropout: float = 0.0,
    scale: float | None = None,  # factor of the scores; by default D ** -0.5
) -> Tensor:
    """Attends with queries to keys and values; returns the heads merged, [B, S, H * D]."""
    if queries.is_cuda and queries.shape[2] <= _FEW_QUERIES and torch.is_inference_mode_enabled():
        mixed = _attend_by_products(queries, keys, values, mask, queries.shape[3] ** -0.5 if scale is None else scale)
    else:
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


def _attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attends by matrix products with scores in float32, for the few queries of a step on a GPU.

    A fused kernel works on 64 queries or more at once, so most of its work would be padding.
    """
    products = float32_products(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    scores = products.view(*queries.shape[:3], -1)  # [B, H, S, T]
    scores = scores * scale if mask is None else torch.add(mask, scores, alpha=scale)
    weights = scores.softmax(-1).to(values.dtype)
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).view(queries.shape)
