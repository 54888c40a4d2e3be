"""XGLM with SmallCap's reduced cross-attention, in the parameter names of the reference's `this_xglm` checkpoints.

Source: Lin et al. 2021 for the language model; RitaRamo/smallcap src/xglm.py for the cross-attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from smallcap.decoding.text_decoder import DecoderConfig, DecoderStack, TextDecoder, init_weights
from smallcap.model.decoder_config import ConfigFormat
from smallcap.model.opt import ENCODER_HIDDEN_SIZE, POSITION_OFFSET, FairseqStack

XGLM_FORMAT = ConfigFormat(
    names={
        "hidden_size": "d_model",
        "num_layers": "num_layers",
        "num_heads": "attention_heads",
        "ffn_size": "ffn_dim",
        "max_positions": "max_position_embeddings",
        "activation": "activation_function",
        "dropout": "dropout",
    },
    defaults={"activation_function": "gelu", "dropout": 0.1},
    fixed={"model_type": "this_xglm", "encoder_hidden_size": ENCODER_HIDDEN_SIZE, "layer_norm_eps": 1e-5},
    extra={"scale_embedding": True},
)


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
        """Maps [B, S] token ids and positions to [B, S, E]."""
        return self.embed_tokens(input_ids) * self.embed_scale + self.positions[position_ids + POSITION_OFFSET]

    def last_norm(self, x: Tensor) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        return self.layer_norm(x)


def sinusoids(count: int, size: int) -> Tensor:
    """Returns fairseq's [count, size] position table: sines in the first half, cosines in the second."""
    frequencies = torch.exp(torch.arange(size // 2) * -(math.log(10_000) / (size // 2 - 1)))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class XGLMDecoder(TextDecoder):
    """XGLM with cross-attention."""

    trained_marker = "encoder_attn"  # occurs in the name of the cross-attention's norm as well, unlike GPT-2's

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = XGLMStack(config)
        init_weights(self)

    @property
    def stack(self) -> DecoderStack:
        """Everything except the output layer."""
        return self.model
