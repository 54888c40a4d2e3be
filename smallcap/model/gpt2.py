"""GPT-2 with SmallCap's reduced cross-attention, in the parameter names of the reference's `this_gpt2` checkpoints.

Source: Radford et al. 2019 for the language model; Ramos et al. 2023, section 3, for the cross-attention. Its queries,
keys and values have the decoder's head count and `1 / cross_attention_reduce_factor` of its head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smallcap.decoding.kv_cache import KeyValueSlots
from smallcap.decoding.text_decoder import (
    DecoderConfig,
    DecoderLayer,
    DecoderStack,
    TextDecoder,
    activation,
    attend,
    init_weights,
    split_heads,
)
from smallcap.errors import CheckpointError
from smallcap.model.decoder_config import ConfigFormat

_FORMAT = ConfigFormat(
    names={
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "ffn_size": "n_inner",
        "max_positions": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
        "dropout": "resid_pdrop",
    },
    defaults={
        "encoder_hidden_size": 768,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
    },
    fixed={"model_type": "this_gpt2"},
)


def parse_gpt2_config(values: dict[str, Any]) -> DecoderConfig:
    """Reads a `this_gpt2` decoder's config as the reference or transformers writes it.

    Raises:
        CheckpointError: An attention variant is asked for that SmallCap never used.
    """
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if values.get(name):
            raise CheckpointError(
                "This GPT-2 attention variant is not supported.", where=f"decoder.{name}", found="true"
            )
    return _FORMAT.parse(values | {"n_inner": values.get("n_inner") or 4 * values["n_embd"]})


def dump_gpt2_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `this_gpt2` config that the reference loads; the inverse of `parse_gpt2_config`."""
    return _FORMAT.dump(config) | {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout}


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-2's checkpoints store it."""

    def __init__(self, out_size: int, in_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_size, out_size))
        self.bias = nn.Parameter(torch.zeros(out_size))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        return F.linear(x, self.weight.T, self.bias)


class SelfAttention(nn.Module):
    """Causal multi-head attention; the mask makes it causal."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.c_attn = Conv1D(3 * config.hidden_size, config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor, layer: int, cache: KeyValueSlots | None) -> Tensor:
        """Maps [B, S, E] and a mask [B, 1, Q, T] to the last Q positions, [B, Q, E]."""
        queries, keys, values = (split_heads(x, self.num_heads) for x in self.c_attn(hidden_states).chunk(3, dim=-1))
        if cache is not None:
            keys, values = cache.append(layer, keys, values)  # [B, H, T, D]
        queries = queries[:, :, -mask.shape[2] :]
        mixed = attend(queries, keys, values, mask, self.dropout if self.training else 0.0)
        return self.c_proj(mixed)


class CrossAttention(nn.Module):
    """Attention of text to an image's P encoder hidden states, of reduced width."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.q_attn = Conv1D(config.cross_attention_size, config.hidden_size)
        self.c_attn = Conv1D(2 * config.cross_attention_size, config.encoder_hidden_size)
        self.c_proj = Conv1D(config.hidden_size, config.cross_attention_size)

    def project(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Projects [B, P, Hv] to keys and values, each [B, H, P, D / reduce factor]."""
        keys, values = self.c_attn(encoder_hidden_states).chunk(2, dim=-1)
        return split_heads(keys, self.num_heads), split_heads(values, self.num_heads)

    def forward(self, hidden_states: Tensor, cross_kv: tuple[Tensor, Tensor]) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        queries = split_heads(self.q_attn(hidden_states), self.num_heads)
        mixed = attend(queries, *cross_kv, None, self.dropout if self.training else 0.0)
        return self.c_proj(mixed)


class FeedForward(nn.Module):
    """The two-layer network of a block."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.ffn_size, config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, config.ffn_size)
        self.activation = activation(config.activation)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        return self.c_proj(self.activation(self.c_fc(hidden_states)))


class Block(DecoderLayer):
    """Self-attention, cross-attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SelfAttention(config)
        self.ln_cross_attn = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.crossattention = CrossAttention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def project_image(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Projects [B, P, Hv] to cross-attention's keys and values, each [B, H, P, D / reduce factor]."""
        return self.crossattention.project(encoder_hidden_states)

    def forward(
        self, x: Tensor, mask: Tensor, cross_kv: tuple[Tensor, Tensor], layer: int, cache: KeyValueSlots | None
    ) -> Tensor:
        """Maps [B, S, E] and a mask [B, 1, Q, T] to the last Q positions, [B, Q, E]."""
        x = x[:, -mask.shape[2] :] + self.dropout(self.attn(self.ln_1(x), mask, layer, cache))
        x = x + self.dropout(self.crossattention(self.ln_cross_attn(x), cross_kv))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Transformer(DecoderStack):
    """Embeddings, blocks and the last layer norm: all of GPT-2 except its output layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_positions, config.hidden_size)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def decoder_layers(self) -> Sequence[DecoderLayer]:
        """The blocks, first to last."""
        return cast("Sequence[DecoderLayer]", self.h)

    @property
    def token_embedding(self) -> Tensor:
        """The input embedding, [V, E]."""
        return self.wte.weight

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Maps [B, S] token ids and positions to [B, S, E]."""
        return self.drop(self.wte(input_ids) + self.wpe(position_ids))

    def last_norm(self, x: Tensor) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        return self.ln_f(x)


class GPT2Decoder(TextDecoder):
    """GPT-2 with cross-attention."""

    trained_marker = "crossattention"  # not ln_cross_attn, which the reference leaves at its initial values

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config)
        init_weights(self)

    @property
    def stack(self) -> DecoderStack:
        """Everything except the output layer."""
        return self.transformer
