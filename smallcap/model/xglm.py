"""XGLM with SmallCap's reduced cross-attention, in the parameter names of the reference's `this_xglm` checkpoints.

Source: Lin et al. 2021 for the language model; RitaRamo/smallcap src/xglm.py for the cross-attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from smallcap.decoding.text_decoder import DecoderConfig, DecoderStack, TextDecoder, init_weights
from smallcap.model.opt import ENCODER_HIDDEN_SIZE, POSITION_OFFSET, FairseqStack


def parse_xglm_config(values: dict[str, Any]) -> DecoderConfig:
    """Reads a `this_xglm` decoder's config as the reference or transformers writes it."""
    return DecoderConfig(
        model_type="this_xglm",
        vocab_size=values["vocab_size"],
        hidden_size=values["d_model"],
        num_layers=values["num_layers"],
        num_heads=values["attention_heads"],
        ffn_size=values["ffn_dim"],
        max_positions=values["max_position_embeddings"],
        encoder_hidden_size=ENCODER_HIDDEN_SIZE,
        cross_attention_reduce_factor=values.get("cross_attention_reduce_factor", 1),
        layer_norm_eps=1e-5,
        activation=values.get("activation_function", "gelu"),
        dropout=values.get("dropout", 0.1),
    )


def dump_xglm_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `this_xglm` config that the reference loads; the inverse of `parse_xglm_config`."""
    return {
        "model_type": "this_xglm",
        "add_cross_attention": True,
        "is_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": config.num_layers,
        "attention_heads": config.num_heads,
        "ffn_dim": config.ffn_size,
        "max_position_embeddings": config.max_positions,
        "encoder_hidden_size": config.encoder_hidden_size,
        "cross_attention_reduce_factor": config.cross_attention_reduce_factor,
        "activation_function": config.activation,
        "dropout": config.dropout,
        "scale_embedding": True,
    }


class XGLMStack(FairseqStack):
    """XGLM's scaled embeddings and sinusoidal positions; its last norm is called `layer_norm`."""

    positions: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_scale = math.sqrt(config.hidden_size)
        table = sinusoids(config.max_positions + POSITION_OFFSET, config.hidden_size)
        self.register_buffer("positions", table, persistent=False)
        self.layer_norm = nn.LayerNorm(config.hidden_size)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[B, S] token ids and positions to [B, S, E]."""
        return self.embed_tokens(input_ids) * self.embed_scale + self.positions[position_ids + POSITION_OFFSET]

    def last_norm(self, x: Tensor) -> Tensor:
        """[B, S, E] to [B, S, E]."""
        return self.layer_norm(x)


def sinusoids(count: int, size: int) -> Tensor:
    """Returns fairseq's [count, size] position table: sines in the first half, cosines in the second."""
    frequencies = torch.exp(torch.arange(size // 2) * -(math.log(10_000) / (size // 2 - 1)))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class XGLMDecoder(TextDecoder):
    """XGLM with cross-attention."""

    trained_marker = "encoder_attn"  # with the cross-attention's norm, unlike GPT-2's: it shares the name

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = XGLMStack(config)
        init_weights(self)

    @property
    def stack(self) -> DecoderStack:
        """All but the output layer."""
        return self.model
