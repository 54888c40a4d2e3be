"""Embeds a text to search with: CLIP's text tower in numpy, because torch takes longer to import than a search takes.

What is embedded for an index or a run comes from `smallcap.model.clip`, whose results these are up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from smallcap.errors import CheckpointError
from smallcap.model.clip_config import MISCOUNTED_EOS, TextConfig, read_clip_config
from smallcap.model.clip_tokenizer import ClipTokenizer
from smallcap.model.encoder_spec import local_encoder
from smallcap.model.files import weights_file
from smallcap.model.prompt import read_tokenizer
from smallcap.model.remote import shown_place
from smallcap.storage import DEFAULT_CACHE_DIR

_ERF = np.frompyfunc(math.erf, 1, 1)


def _tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: 0.5 * x * (1 + np.asarray(_ERF(x / math.sqrt(2)), np.float32)),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def embed_text(spec: str, text: str) -> np.ndarray:
    """Embeds a text as the encoder of a spec does, [1, dim] float32; imports torch only for other kinds than CLIP's.

    Raises:
        ConfigError: The spec has no known form.
        CheckpointError: What it names cannot be found or is not a CLIP model.
    """
    backend, name, _ = local_encoder(spec, DEFAULT_CACHE_DIR)
    if backend == "hf":
        folder = Path(name)
        _, config, _ = read_clip_config(folder)
        weights = _read_weights(weights_file(folder))
        if weights is not None and config.hidden_act in _ACTIVATIONS and (folder / "tokenizer.json").is_file():
            tokenizer = ClipTokenizer.of_tokenizers(
                read_tokenizer(folder / "tokenizer.json"), config.max_position_embeddings
            )
            feature = TextTower(weights, config)(tokenizer([text])[0])
            return (feature / np.linalg.norm(feature))[None]
    from smallcap.model.clip_encoder import load_retrieval_encoder

    return load_retrieval_encoder(spec).encode_texts([text])


def _read_weights(path: Path) -> dict[str, np.ndarray] | None:
    """Reads the text tower's weights as float32; returns None for files and precisions that numpy does not know.

    Raises:
        CheckpointError: The file is damaged.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if name.startswith(("text_model.", "text_projection."))]  # noqa: SIM118
            if any(file.get_slice(name).get_dtype() not in ("F16", "F32") for name in names):
                return None
            return {name: file.get_tensor(name).astype(np.float32) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError("The weights file is damaged.", where=shown_place(path), found=str(error)) from error


class TextTower:
    """CLIP's text transformer with its projection.

    Args:
        weights: Its tensors by their names in transformers.
        config: Its sizes.
    """

    def __init__(self, weights: dict[str, np.ndarray], config: TextConfig) -> None:
        self._weights, self._config = weights, config

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """Maps a text's token ids to its features, [dim], which have no unit length yet.

        Raises:
            CheckpointError: Weights are missing.
        """
        config, by_id = self._config, np.array(ids)
        end = int((by_id if config.eos_token_id == MISCOUNTED_EOS else by_id == config.eos_token_id).argmax())
        try:
            x = self._weights["text_model.embeddings.token_embedding.weight"][by_id[: end + 1]]
            x = x + self._weights["text_model.embeddings.position_embedding.weight"][: end + 1]
            for number in range(config.num_hidden_layers):
                layer = f"text_model.encoder.layers.{number}"
                x = x + self._attend(self._normalise(x, f"{layer}.layer_norm1"), f"{layer}.self_attn")
                hidden = self._linear(self._normalise(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
                x = x + self._linear(_ACTIVATIONS[config.hidden_act](hidden), f"{layer}.mlp.fc2")
            last = self._normalise(x[-1], "text_model.final_layer_norm")
            return last @ self._weights["text_projection.weight"].T
        except KeyError as error:
            raise CheckpointError("The encoder's weights are incomplete.", found=f"no {error}") from error

    def _attend(self, x: np.ndarray, name: str) -> np.ndarray:
        """Maps [S, E] to [S, E]; no token sees those after it."""
        heads = self._config.num_attention_heads
        queries, keys, values = (
            self._linear(x, f"{name}.{kind}_proj").reshape(len(x), heads, -1).transpose(1, 0, 2) for kind in "qkv"
        )
        scores = queries @ keys.transpose(0, 2, 1) / math.sqrt(queries.shape[-1])  # [H, S, S]
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = shares / shares.sum(axis=-1, keepdims=True) @ values
        return self._linear(mixed.transpose(1, 0, 2).reshape(x.shape), f"{name}.out_proj")

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _normalise(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(variance + self._config.layer_norm_eps)
        return scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
