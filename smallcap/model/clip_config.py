"""The sizes of a CLIP as transformers saves it; without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from smallcap.errors import CheckpointError
from smallcap.model.remote import shown_place

MISCOUNTED_EOS = 2  # the text's end in configs from before transformers 4.32, whatever the vocabulary says
_TOWERS = ("vision_config", "text_config")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The sizes of a tower under their names in transformers."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Takes the values that it knows; others keep the defaults of transformers."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerConfig):
    """The sizes of a vision tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class TextConfig(TowerConfig):
    """The sizes of a text tower."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


def read_clip_config(folder: Path) -> tuple[VisionConfig, TextConfig, int]:
    """Reads the sizes of both towers, and the length of an embedding, from a folder's `config.json`.

    Raises:
        CheckpointError: It is missing or malformed.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes())
        # Where an old config has both, transformers takes the second, and defaults for what that leaves out.
        towers = [values.get(f"{name}_dict") or values.get(name) or {} for name in _TOWERS]
        vision, text = VisionConfig.parse(towers[0]), TextConfig.parse(towers[1])
        return vision, text, int(values.get("projection_dim", 512))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "The encoder's config cannot be read.", where=shown_place(path), found=str(error)
        ) from error
