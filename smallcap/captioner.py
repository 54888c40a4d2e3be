"""From images to captions: encode, embed, retrieve, prompt, generate, detokenise.

`Captioner.caption_batch` is the whole algorithm of SmallCap on one screen. It runs in a plain Python loop as in a Ray
actor, and knows nothing of where images come from or where captions go.

Source: Ramos et al. 2023, figure 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smallcap.checkpoint import SmallCapModel, load_checkpoint, load_config, tokenizer_source
from smallcap.clip_encoder import (
    RetrievalEncoder,
    load_preprocessing,
    load_retrieval_encoder,
    normalise_pixels,
    resolve_encoder_identity,
    vision_preprocessing,
)
from smallcap.errors import ConfigError, RowError
from smallcap.image import MAX_IMAGE_PIXELS, Preprocessing, crop_pixels, decode_image
from smallcap.index_manifest import load_manifest
from smallcap.model_files import resolve_folder
from smallcap.prompt import build_prompts, decode_caption, load_tokenizer
from smallcap.retriever import Neighbour, Retriever

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CaptionResult:
    """What became of one image: a caption, or an error."""

    caption: str | None = None
    logprob: float | None = None  # natural log, summed over the caption's tokens
    num_tokens: int | None = None  # generated tokens, eos included
    clip_score: float | None = None  # cosine of image and caption; None without a retrieval encoder
    neighbours: tuple[Neighbour, ...] = ()
    width: int | None = None  # px
    height: int | None = None  # px
    error: RowError | None = None


@dataclass(frozen=True)
class Pixels:
    """One image's crops, as the encoders take them: the product of a CPU task."""

    vision: np.ndarray  # [S, S, 3] uint8
    retrieval: np.ndarray | None  # [S', S', 3] uint8; None where the retrieval encoder takes the same crop
    width: int  # px of the whole image
    height: int  # px of the whole image


@dataclass(frozen=True)
class CropPlan:
    """Which crops the model needs of every image; small enough to send to every decoding task."""

    vision: Preprocessing
    retrieval: Preprocessing | None  # None where there is no retrieval encoder, or it takes the same crop

    @classmethod
    def of(cls, vision: Preprocessing, retrieval: Preprocessing | None) -> CropPlan:
        """Returns the plan for two encoders, of which the second may be missing or take the first one's crop."""
        return cls(vision, None if retrieval == vision else retrieval)

    @classmethod
    def load(cls, model: str, retrieval_encoder: str | None) -> CropPlan:
        """Returns the plan for a checkpoint and a retrieval encoder spec without loading either's weights.

        Raises:
            CheckpointError: One of them cannot be found.
        """
        vision = vision_preprocessing(load_config(resolve_folder(model, demo_part="smallcap")).vision)
        return cls.of(vision, load_preprocessing(retrieval_encoder) if retrieval_encoder else None)

    def crop(self, data: bytes | Image.Image, max_pixels: int = MAX_IMAGE_PIXELS, where: str = "") -> Pixels:
        """Decodes an image and cuts its crops.

        Raises:
            RowError: The image cannot be decoded.
        """
        image = data.convert("RGB") if isinstance(data, Image.Image) else decode_image(data, max_pixels, where)
        return Pixels(
            vision=crop_pixels(image, self.vision),
            retrieval=crop_pixels(image, self.retrieval) if self.retrieval else None,
            width=image.width,
            height=image.height,
        )


class Captioner:
    """Captions images with a SmallCap model and the captions retrieved from an index.

    Attributes:
        model: The SmallCap model.
        retriever: The index, or None when captioning without retrieval.
        crop_plan: What images must be cut to.
    """

    def __init__(
        self,
        model: SmallCapModel,
        tokenizer: PreTrainedTokenizerBase,
        retrieval_encoder: RetrievalEncoder | None = None,
        retriever: Retriever | None = None,
        k: int = 4,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        length_penalty: float | None = None,
    ) -> None:
        if k and (retriever is None or retrieval_encoder is None):
            raise ConfigError(
                "Retrieval needs an index and its encoder.", where=f"k={k}", remedy="Give an index, or set k to 0."
            )
        self.model, self.tokenizer, self.k = model, tokenizer, k
        self.retrieval_encoder, self.retriever = retrieval_encoder, retriever
        self._generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
        self._shares_encoder = retrieval_encoder is not None and retrieval_encoder.share_weights_with(model.encoder)
        self.crop_plan = CropPlan.of(
            model.encoder.preprocessing, retrieval_encoder.preprocessing if retrieval_encoder else None
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        index: str | None = None,
        k: int | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        length_penalty: float | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        retrieval_encoder: str | None = None,
        cache_dir: str = "~/.cache/smallcap",
        index_id: str | None = None,
    ) -> Captioner:
        """Loads all parts of a captioner.

        Args:
            model: `demo`, a checkpoint folder, or a hub id.
            index: A published index's URI; not needed with k=0.
            k: Retrieved captions per prompt; by default the checkpoint's.
            num_beams: 1 decodes greedily; by default the checkpoint's.
            max_new_tokens: Most tokens of a caption; by default the checkpoint's.
            length_penalty: Exponent of a finished beam's length; by default the checkpoint's.
            device: A torch device.
            dtype: `float32`, `bfloat16` or `float16`.
            retrieval_encoder: Its spec; by default the one that the index names.
            cache_dir: Where copies of remote indexes are kept.
            index_id: The index's version; by default the current one.

        Raises:
            CheckpointError: The model or the encoder cannot be loaded.
            ManifestError: There is no published index.
            IndexIntegrityError: The index is damaged, or was built with another encoder.
        """
        encoder = retriever = None
        if index is not None and k != 0:  # the index is checked before any model is loaded
            manifest = load_manifest(index, index_id)
            spec = retrieval_encoder or manifest.encoder.spec
            identity = resolve_encoder_identity(spec)
            retriever = Retriever.open(index, encoder=identity, cache_dir=cache_dir, index_id=manifest.index_id)
            encoder = load_retrieval_encoder(spec, device, dtype)
        elif retrieval_encoder is not None:
            encoder = load_retrieval_encoder(retrieval_encoder, device, dtype)
        loaded = load_checkpoint(model, device, dtype)
        tokenizer = load_tokenizer(tokenizer_source(model))
        k = (loaded.config.k if loaded.config.rag else 0) if k is None else k
        return cls(loaded, tokenizer, encoder, retriever, k, num_beams, max_new_tokens, length_penalty)

    def caption(
        self,
        images: Sequence[bytes | Image.Image],
        image_ids: Sequence[str | None] | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> list[CaptionResult]:
        """Captions images in one batch; an undecodable one gets an error instead of a caption.

        Args:
            images: Encoded image files, or PIL images.
            image_ids: When given, captions whose source is the same image are not retrieved for it.
            max_pixels: Larger images are errors.

        Returns:
            One result per image, in order.
        """
        results: list[CaptionResult | None] = [None] * len(images)
        decoded: dict[int, Pixels] = {}
        for position, data in enumerate(images):
            try:
                decoded[position] = self.crop_plan.crop(data, max_pixels)
            except RowError as error:
                results[position] = CaptionResult(error=error)
        ids = None if image_ids is None else [image_ids[position] for position in decoded]
        captioned = self.caption_batch(list(decoded.values()), ids)
        for position, result in zip(decoded, captioned, strict=True):
            results[position] = result
        return [result for result in results if result is not None]

    @torch.inference_mode()
    def caption_batch(
        self, pixels: Sequence[Pixels], exclude_image_ids: Sequence[str | None] | None = None
    ) -> list[CaptionResult]:
        """Captions decoded images.

        Args:
            pixels: B images' crops, made by this captioner's `crop_plan`.
            exclude_image_ids: B image ids whose own captions are not retrieved.

        Returns:
            B results, in order.
        """
        if not pixels:
            return []
        hidden_states, class_token = self._encode(pixels)
        queries = self._embed(pixels, class_token)
        neighbours = self._retrieve(queries, exclude_image_ids, len(pixels))
        texts = [[neighbour.text for neighbour in of_image] for of_image in neighbours]
        config = self.model.config
        prompts = build_prompts(self.tokenizer, config.template, texts, config.bos_token_id)
        generated = self.model.generate(hidden_states, prompts, **self._generation)  # type: ignore[arg-type]
        captions = [decode_caption(self.tokenizer, one.token_ids, config.eos_token_id) for one in generated]
        clip_scores = self._clip_scores(queries, captions)
        return [
            CaptionResult(
                caption=captions[i],
                logprob=generated[i].score * self._length_norm(len(generated[i].token_ids)),
                num_tokens=len(generated[i].token_ids),
                clip_score=clip_scores[i],
                neighbours=tuple(neighbours[i]),
                width=pixels[i].width,
                height=pixels[i].height,
            )
            for i in range(len(pixels))
        ]

    def _encode(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        """Returns the vision encoder's hidden states [B, P, Hv] and class token [B, Hv]."""
        crops = np.stack([one.vision for one in pixels])
        encoder = self.model.encoder
        hidden_states, class_token = encoder(self._to_pixel_values(crops, encoder.preprocessing))
        return hidden_states, class_token

    def _embed(self, pixels: Sequence[Pixels], class_token: Tensor) -> np.ndarray | None:
        """Returns the images' embeddings for search, [B, dim] float32 unit vectors."""
        encoder = self.retrieval_encoder
        if encoder is None:
            return None
        if self._shares_encoder:
            return encoder.project(class_token).cpu().numpy()
        crops = np.stack([one.vision if one.retrieval is None else one.retrieval for one in pixels])
        return encoder.encode_images(self._to_pixel_values(crops, encoder.preprocessing)).cpu().numpy()

    def _retrieve(
        self, queries: np.ndarray | None, exclude_image_ids: Sequence[str | None] | None, count: int
    ) -> list[list[Neighbour]]:
        if self.k == 0:
            return [[] for _ in range(count)]
        assert self.retriever is not None and queries is not None
        return self.retriever.search(queries, self.k, exclude_image_ids)

    def _clip_scores(self, queries: np.ndarray | None, captions: Sequence[str]) -> list[float | None]:
        if queries is None or self.retrieval_encoder is None:
            return [None] * len(captions)
        embedded = self.retrieval_encoder.encode_texts(captions)
        return [float(score) for score in (queries * embedded).sum(axis=1)]

    def _to_pixel_values(self, crops: np.ndarray, preprocessing: Preprocessing) -> Tensor:
        pixels = torch.from_numpy(crops).to(self.model.device, non_blocking=True)
        return normalise_pixels(pixels, preprocessing, self.model.dtype)

    def _length_norm(self, length: int) -> float:
        """What a generated score was divided by, to give the plain sum of log probabilities back."""
        penalty = self._generation["length_penalty"]
        return float(length ** (self.model.config.length_penalty if penalty is None else penalty))
