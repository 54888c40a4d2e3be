"""CLIP's vision and text towers, with the parameters and the results that they have in transformers' `CLIPModel`.

transformers itself takes several times as long to import as torch, in every process that captions or searches.

Source: Radford et al. 2021; huggingface/transformers src/transformers/models/clip/modeling_clip.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smallcap.decoding.text_decoder import activation, init_weights, split_heads
from smallcap.errors import CheckpointError
from smallcap.model.clip_config import MISCOUNTED_EOS, TextConfig, TowerConfig, VisionConfig, read_clip_config
from smallcap.model.files import weights_file
from smallcap.model.remote import shown_place
from smallcap.model.weights import Unfilled, read_tensors


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.k_proj, self.v_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.q_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        queries, keys, values = (
            split_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The two-layer network of a layer."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.activation_fn = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        return self.fc2(self.activation_fn(self.fc1(x)))


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        x = x + self.self_attn(self.layer_norm1(x), is_causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A tower's layers."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        """Maps [B, S, E] to [B, S, E]."""
        for layer in self.layers:
            x = layer(x, is_causal)
        return x


class VisionEmbeddings(nn.Module):
    """Patches, a class token before them, and their positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(size) * size**-0.5)
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps [B, 3, S, S] pixels to [B, P, Hv]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(len(pixel_values), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """CLIP's vision transformer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's own spelling
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        init_weights(self)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, 3, S, S] normalised pixels to all tokens [B, P, Hv], and the normalised class token [B, Hv]."""
        hidden_states = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return hidden_states, self.post_layernorm(hidden_states[:, 0])


class TextEmbeddings(nn.Module):
    """Tokens and their positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps [B, S] token ids to [B, S, E]."""
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class TextTower(nn.Module):
    """CLIP's text transformer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        init_weights(self)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps [B, S] token ids, each row with its end and anything after it, to the text's features [B, E].

        No token sees those after it, so that what fills the rows up is not masked.
        """
        hidden_states = self.encoder(self.embeddings(input_ids), is_causal=True)
        # The end has the highest id where the config is wrong about it. What fills up must not be higher.
        ends = input_ids if self.eos_token_id == MISCOUNTED_EOS else (input_ids == self.eos_token_id).int()
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return self.final_layer_norm(hidden_states[rows, ends.argmax(dim=-1)])


class Clip(nn.Module):
    """Both towers, and their projections into one space.

    Args:
        vision: The sizes of the vision tower.
        text: The sizes of the text tower.
        dim: Length of an embedding.
    """

    def __init__(self, vision: VisionConfig, text: TextConfig, dim: int) -> None:
        super().__init__()
        self.vision_config, self.text_config = vision, text
        self.text_model, self.vision_model = TextTower(text), VisionTower(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, dim, bias=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Loads a folder as transformers saves it, in the precision of its weights.

        Raises:
            CheckpointError: Its config or weights are damaged, or not those of a CLIP.
        """
        vision, text, dim = read_clip_config(folder)
        with Unfilled():
            clip = cls(vision, text, dim)
        path = weights_file(folder)
        # Others than these: the scale of logits, which no embedding needs, and positions in older files.
        outcome = clip.load_state_dict(read_tensors(path), strict=False, assign=True)
        if missing := outcome.missing_keys:
            raise CheckpointError(
                "The encoder's weights are incomplete.",
                where=shown_place(path),
                found=f"{len(missing)} missing, such as {missing[0]}",
            )
        return clip


def pad_right(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """Fills rows of token ids up to one length with zeros, which no token before them sees: [B, S] int64."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    mask = np.arange(length) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    return torch.from_numpy(ids)
