"""OPT with SmallCap's reduced cross-attention, in the parameter names of the reference's `this_opt` checkpoints.

XGLM (`xglm`) has the same layers; it differs in its embeddings, its activation and the place of its last norm.

Source: Zhang et al. 2022 for the language model; RitaRamo/smallcap src/opt.py for the cross-attention, whose scores are
scaled by the head size before reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

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

POSITION_OFFSET = 2  # fairseq keeps the first two positions for padding
ENCODER_HIDDEN_SIZE = 768  # the reference writes it into the code for these decoders, whatever the config says


_FORMAT = ConfigFormat(
    names={
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_size": "ffn_dim",
        "max_positions": "max_position_embeddings",
        "activation": "activation_function",
        "dropout": "dropout",
    },
    defaults={"activation_function": "relu", "dropout": 0.1},
    fixed={"model_type": "this_opt", "encoder_hidden_size": ENCODER_HIDDEN_SIZE, "layer_norm_eps": 1e-5},
    extra={"do_layer_norm_before": True},
)


def parse_opt_config(values: dict[str, Any]) -> DecoderConfig:
    """Reads a `this_opt` decoder's config as the reference or transformers writes it.

    Raises:
        CheckpointError: It is an OPT variant that SmallCap never used (OPT-350m's projections or late norms).
    """
    hidden_size = values["hidden_size"]
    if values.get("word_embed_proj_dim", hidden_size) != hidden_size or not values.get("do_layer_norm_before", True):
        raise CheckpointError(
            "This OPT variant is not supported.",
            where="decoder.word_embed_proj_dim, decoder.do_layer_norm_before",
            expected="norms before attention and embeddings of the hidden size, as all sizes but 350m have",
        )
    return _FORMAT.parse(values)


def dump_opt_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `this_opt` config that the reference loads; the inverse of `parse_opt_config`."""
    return _FORMAT.dump(config) | {"word_embed_proj_dim": config.hidden_size}


class Attention(nn.Module):
    """Multi-head attention with one projection each for queries, keys and values.

    Args:
        config: The decoder's sizes.
        size: Width of queries, keys and values over all heads.
        source_size: Width of what keys and values are projected from.
    """

    def __init__(self, config: DecoderConfig, size: int, source_size: int) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.scale = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, size)
        self.k_proj = nn.Linear(source_size, size)
        self.v_proj = nn.Linear(source_size, size)
        self.out_proj = nn.Linear(size, config.hidden_size)

    def project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Projects [B, P, source] to keys and values, each [B, H, P, size / H]."""
        return split_heads(self.k_proj(source), self.num_heads), split_heads(self.v_proj(source), self.num_heads)

    def forward(self, hidden_states: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        queries = split_heads(self.q_proj(hidden_states), self.num_heads)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(queries, keys, values, mask, dropout, self.scale))


class OPTLayer(DecoderLayer):
    """Self-attention, cross-attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size, config.hidden_size)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.encoder_attn = Attention(config, config.cross_attention_size, config.encoder_hidden_size)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.activation = activation(config.activation)
        self.dropout = nn.Dropout(config.dropout)

    def project_image(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Projects [B, P, Hv] to cross-attention's keys and values, each [B, H, P, D / reduce factor]."""
        return self.encoder_attn.project(encoder_hidden_states)

    def forward(
        self, x: Tensor, mask: Tensor, cross_kv: tuple[Tensor, Tensor], layer: int, cache: KeyValueSlots | None
    ) -> Tensor:
        """Maps [B, S, E] and a mask [B, 1, Q, T] to the last Q positions, [B, Q, E]."""
        normed = self.self_attn_layer_norm(x)
        keys, values = self.self_attn.project(normed)
        if cache is not None:
            keys, values = cache.append(layer, keys, values)  # [B, H, T, D]
        wanted = slice(-mask.shape[2], None)
        x = x[:, wanted] + self.dropout(self.self_attn(normed[:, wanted], keys, values, mask))
        x = x + self.dropout(self.encoder_attn(self.encoder_attn_layer_norm(x), *cross_kv, None))
        return x + self.dropout(self.fc2(self.activation(self.fc1(self.final_layer_norm(x)))))


class FairseqStack(DecoderStack):
    """What OPT and XGLM have in common."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OPTLayer(config) for _ in range(config.num_layers))

    @property
    def decoder_layers(self) -> Sequence[DecoderLayer]:
        """The layers, first to last."""
        return cast("Sequence[DecoderLayer]", self.layers)

    @property
    def token_embedding(self) -> Tensor:
        """The input embedding, [V, E]."""
        return self.embed_tokens.weight


class OPTStack(FairseqStack):
    """OPT's learned positions; its last norm is called `final_layer_norm`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_positions = nn.Embedding(config.max_positions + POSITION_OFFSET, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Maps [B, S] token ids and positions to [B, S, E]."""
        return self.embed_tokens(input_ids) + self.embed_positions(position_ids + POSITION_OFFSET)

    def last_norm(self, x: Tensor) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        return self.final_layer_norm(x)


class OPTDecoder(TextDecoder):
    """OPT with cross-attention."""

    trained_marker = "encoder_attn"  # occurs in the name of the cross-attention's norm as well, unlike GPT-2's

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = nn.ModuleDict({"decoder": OPTStack(config)})
        init_weights(self)

    @property
    def stack(self) -> DecoderStack:
        """Everything except the output layer."""
        return cast("DecoderStack", self.model["decoder"])
