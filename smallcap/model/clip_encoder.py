"""The two roles of CLIP: a vision encoder that feeds cross-attention, and a retrieval encoder that embeds for search.

A retrieval encoder is a folder of transformers or a model of open_clip, as its spec says
(`smallcap.model.encoder_spec`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from smallcap.decoding.packed_linear import pack_linears
from smallcap.errors import CheckpointError
from smallcap.images.decode import Preprocessing
from smallcap.index.manifest import EncoderIdentity
from smallcap.machine.precision import choose_kernels, find_device
from smallcap.machine.shapes import fill_up, rows_on_gpu, tokens_on_gpu
from smallcap.model.clip import Clip, VisionTower, pad_right
from smallcap.model.clip_config import VisionConfig
from smallcap.model.clip_tokenizer import ClipTokenizer
from smallcap.model.encoder_spec import (
    local_encoder,
    open_clip_preprocessing,
    resolve_encoder_identity,
    uses_quick_gelu,
    vision_preprocessing,
)
from smallcap.model.prompt import read_tokenizer
from smallcap.storage import DEFAULT_CACHE_DIR

_TEXT_BATCH = 256


def normalise_pixels(pixels: Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
    """Turns [B, S, S, 3] uint8 pixels into an encoder's [B, 3, S, S] `pixel_values`, on the pixels' device."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device) * 255
    std = torch.tensor(preprocessing.std, device=pixels.device) * 255
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2).to(dtype)


class VisionEncoder(nn.Module):
    """CLIP's vision transformer, which feeds cross-attention.

    Attributes:
        transformer: The model; its state dict has the names of the reference's `encoder.*` tensors.
        preprocessing: How its images must be prepared.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.transformer: nn.Module = VisionTower(VisionConfig.parse(config))
        self.preprocessing = vision_preprocessing(config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images.

        Args:
            pixel_values: [B, 3, S, S], normalised, on the model's device and in its dtype.

        Returns:
            All tokens before the last layer norm [B, P, Hv], which cross-attention reads, and the normalised class
            token [B, Hv], which a retrieval encoder of the same weights projects.
        """
        count = len(pixel_values)
        hidden_states, class_token = self.transformer(fill_up(pixel_values))
        return hidden_states[:count], class_token[:count]


class RetrievalEncoder(ABC):
    """Embeds images and texts as unit vectors of one space."""

    def __init__(self, identity: EncoderIdentity, preprocessing: Preprocessing, device: torch.device) -> None:
        self.identity = identity
        self.preprocessing = preprocessing
        self.device = device

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.identity.dim

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Embeds [B, 3, S, S] normalised pixels as [B, dim] float32 unit vectors."""
        with torch.inference_mode():
            features = self._image_features(fill_up(pixel_values))[: len(pixel_values)]
            return F.normalize(features.float(), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts as a [N, dim] float32 array of unit vectors."""
        embeddings = [np.zeros((0, self.dim), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(texts), _TEXT_BATCH):
                batch = list(texts[start : start + _TEXT_BATCH])
                rows = rows_on_gpu(len(batch)) if self.device.type == "cuda" else len(batch)
                features = self._text_features(batch + batch[-1:] * (rows - len(batch)))[: len(batch)]
                embeddings.append(F.normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(embeddings)

    def share_weights_with(self, vision_encoder: VisionEncoder) -> bool:
        """Uses the vision encoder's weights for images if they are the same; `project` then replaces a second pass.

        Returns:
            Whether the weights are the same.
        """
        return False

    def project(self, class_token: Tensor) -> Tensor:
        """Embeds images from a weight-sharing vision encoder's [B, Hv] class token, as `encode_images` would."""
        raise NotImplementedError

    def pack(self) -> None:  # noqa: B027 - open_clip's attention reads its layers' weights itself, so they must stay
        """Lays the weights out for this CPU if possible; the encoder then embeds as before."""

    @property
    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """The module that sees images."""

    @abstractmethod
    def _image_features(self, pixel_values: Tensor) -> Tensor: ...

    @abstractmethod
    def _text_features(self, texts: list[str]) -> Tensor: ...


class HFRetrievalEncoder(RetrievalEncoder):
    """A CLIP as transformers saves it, with its tokenizer."""

    def __init__(self, model: Clip, tokenizer: Tokenizer, identity: EncoderIdentity) -> None:
        self._model: Any = model.eval()
        self._max_tokens = model.text_config.max_position_embeddings
        self._tokenise = ClipTokenizer.of_tokenizers(tokenizer, self._max_tokens)
        preprocessing = Preprocessing(size_px=model.vision_config.image_size)
        super().__init__(identity, preprocessing, model.text_projection.weight.device)

    @classmethod
    def load(cls, folder: Path, identity: EncoderIdentity, device: torch.device, dtype: torch.dtype) -> Self:
        """Loads a folder as transformers saves it."""
        model = Clip.load(folder).to(device, dtype)
        if (folder / "tokenizer.json").is_file():
            return cls(model, read_tokenizer(folder / "tokenizer.json"), identity)
        from transformers import AutoTokenizer  # which takes seconds to import

        return cls(model, AutoTokenizer.from_pretrained(folder).backend_tokenizer, identity)

    def share_weights_with(self, vision_encoder: VisionEncoder) -> bool:
        """Drops this model's vision tower if the vision encoder has the same weights."""
        shared_tower = vision_encoder.transformer
        if not _same_tensors(self._model.vision_model.state_dict(), shared_tower.state_dict()):
            return False
        self._model.vision_model = shared_tower
        return True

    def project(self, class_token: Tensor) -> Tensor:
        """Embeds images from the vision encoder's [B, Hv] normalised class token, as [B, dim] float32 unit vectors."""
        with torch.inference_mode():
            return F.normalize(self._model.visual_projection(class_token).float(), dim=-1)

    def pack(self) -> None:
        """Lays the weights out for this CPU if possible; the encoder then embeds as before."""
        pack_linears(self._model)

    @property
    def vision_tower(self) -> nn.Module:
        """The module that sees images."""
        return cast("nn.Module", self._model.vision_model)

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        _, class_token = self._model.vision_model(pixel_values)
        return self._model.visual_projection(class_token)

    def _text_features(self, texts: list[str]) -> Tensor:
        rows = self._tokenise(texts)
        length = max(map(len, rows))
        if self.device.type == "cuda":
            length = min(tokens_on_gpu(length), self._max_tokens)
        return self._model.text_projection(self._model.text_model(pad_right(rows, length).to(self.device)))


class OpenCLIPRetrievalEncoder(RetrievalEncoder):
    """A model of open_clip: a built-in architecture with pretrained weights, or a folder or hub id with its config."""

    def __init__(
        self, model: Any, tokenizer: Any, identity: EncoderIdentity, preprocessing: Preprocessing, device: torch.device
    ) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self._tokenise = ClipTokenizer.of_open_clip(tokenizer)
        model.visual.to(memory_format=torch.channels_last)  # the pixels' layout, which suits convolutions on a GPU
        super().__init__(identity, preprocessing, device)

    @classmethod
    def load(
        cls, name: str, pretrained: str | None, identity: EncoderIdentity, device: torch.device, dtype: torch.dtype
    ) -> Self:
        """Loads an architecture with the weights of a pretrained tag or a file; without either, what `name` says."""
        import open_clip

        model = open_clip.create_model(
            name,
            pretrained=pretrained,
            precision={torch.float32: "fp32", torch.bfloat16: "pure_bf16", torch.float16: "pure_fp16"}[dtype],
            device=device,
            force_quick_gelu=uses_quick_gelu(name, pretrained),
            require_pretrained=True,
        )
        return cls(model, open_clip.get_tokenizer(name), identity, open_clip_preprocessing(name, pretrained), device)

    @property
    def vision_tower(self) -> nn.Module:
        """The module that sees images."""
        return cast("nn.Module", self._model.visual)

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        return self._model.encode_image(pixel_values)

    def _text_features(self, texts: list[str]) -> Tensor:
        if self._tokenise is None:
            ids = self._tokenizer(texts)
        else:
            ids = pad_right(self._tokenise(texts), self._tokenizer.context_length)
        return self._model.encode_text(ids.to(self.device))


def load_retrieval_encoder(
    spec: str, device: str = "cpu", dtype: str = "float32", cache_dir: str = DEFAULT_CACHE_DIR
) -> RetrievalEncoder:
    """Loads a retrieval encoder.

    Args:
        spec: `demo`, `hf:ID-OR-PATH`, or `open_clip:MODEL/PRETRAINED-OR-PATH`.
        device: `cpu`, `cuda` or `cuda:N`. For a GPU, see `choose_kernels`, which concerns the whole process.
        dtype: `float32`, `bfloat16` or `float16`.
        cache_dir: This node's cache folder, for copies of what is remote.

    Raises:
        ConfigError: The spec has no known form, or the device is not here.
        CheckpointError: What it names cannot be found or is not a CLIP model.
        StorageError: The store that has it fails.
    """
    torch_device, torch_dtype = find_device(device), getattr(torch, dtype)
    identity = resolve_encoder_identity(spec, cache_dir)
    backend, name, pretrained = local_encoder(spec, cache_dir)
    choose_kernels(torch_dtype, torch_device)
    try:
        if backend == "hf":
            return HFRetrievalEncoder.load(Path(name), identity, torch_device, torch_dtype)
        return OpenCLIPRetrievalEncoder.load(name, pretrained, identity, torch_device, torch_dtype)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError("The retrieval encoder cannot be loaded.", where=spec, found=str(error)) from error


def _same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.equal(first[name], second[name]) for name in first
    )
