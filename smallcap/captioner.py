"""From images to captions: encode, embed, retrieve, prompt, generate, detokenise.

`Captioner.caption_batch` is the whole algorithm of SmallCap on one screen. It runs in a plain Python loop as in a Ray
actor, and knows nothing of where images come from or where captions go.

Source: Ramos et al. 2023, figure 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smallcap.config import DecodeMode, GenerationConfig, SearchDevice
from smallcap.decoding.engine import Generated
from smallcap.decoding.sampling import Sampling
from smallcap.errors import ConfigError, RowError
from smallcap.images.crops import CropPlan, Pixels
from smallcap.images.decode import MAX_IMAGE_PIXELS, Preprocessing
from smallcap.index.manifest import load_manifest
from smallcap.index.retriever import Neighbour, NeighbourSearch, Retriever
from smallcap.machine.precision import resolve_dtype
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint, load_config, tokenizer_source
from smallcap.model.clip_encoder import (
    RetrievalEncoder,
    load_preprocessing,
    load_retrieval_encoder,
    normalise_pixels,
    resolve_encoder_identity,
    vision_preprocessing,
)
from smallcap.model.files import resolve_folder
from smallcap.model.prompt import build_prompts, decode_caption, load_tokenizer
from smallcap.storage import DEFAULT_CACHE_DIR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoredCaption:
    """A further caption of an image."""

    caption: str
    logprob: float  # natural log, summed over the caption's tokens
    num_tokens: int  # generated tokens, eos included


@dataclass(frozen=True)
class CaptionResult:
    """What became of one image: a caption, or an error."""

    caption: str | None = None
    logprob: float | None = None  # natural log, summed over the caption's tokens
    num_tokens: int | None = None  # generated tokens, eos included
    clip_score: float | None = None  # cosine of image and caption; None without a retrieval encoder
    alternatives: tuple[ScoredCaption, ...] = ()  # the next best captions, where more than one was asked for
    neighbours: tuple[Neighbour, ...] = ()
    embedding: np.ndarray | None = field(default=None, compare=False)  # [dim] float32, the retrieval encoder's
    width: int | None = None  # px
    height: int | None = None  # px
    error: RowError | None = None


@dataclass(frozen=True)
class PreparedBatch:
    """B images just before their first token is generated."""

    hidden_states: Tensor  # [B, P, Hv]
    queries: np.ndarray | None  # [B, dim] float32, the images' embeddings
    neighbours: list[list[Neighbour]]
    prompts: list[list[int]]
    keys: list[int] | None  # for sampling
    sizes: list[tuple[int, int]]  # px, of the whole images


class Captioner:
    """Captions images with a SmallCap model and the captions retrieved from an index.

    Attributes:
        model: The SmallCap model.
        retriever: The index, or None when captioning without retrieval.
        crop_plan: What images must be cut to.
        generation: How captions are decoded.
    """

    def __init__(
        self,
        model: SmallCapModel,
        tokenizer: PreTrainedTokenizerBase,
        retrieval_encoder: RetrievalEncoder | None = None,
        retriever: NeighbourSearch | None = None,
        k: int = 4,
        generation: GenerationConfig | None = None,
        clip_score: bool = True,
    ) -> None:
        if k and (retriever is None or retrieval_encoder is None):
            raise ConfigError(
                "Retrieval needs an index and its encoder.", where=f"k={k}", remedy="Give an index, or set k to 0."
            )
        self.model, self.tokenizer, self.k = model, tokenizer, k
        self.retrieval_encoder, self.retriever = retrieval_encoder, retriever
        self.generation = model.generation_options(generation or GenerationConfig())
        self._scores_captions = clip_score
        self._beside: torch.cuda.Stream | None = None
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
        generation: GenerationConfig | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        retrieval_encoder: str | None = None,
        cache_dir: str = DEFAULT_CACHE_DIR,
        index_id: str | None = None,
        compile_encoders: bool = False,
        search_device: SearchDevice = "auto",
        retriever: NeighbourSearch | None = None,
        clip_score: bool = True,
    ) -> Captioner:
        """Loads all parts of a captioner.

        Args:
            model: `demo`, a checkpoint folder, or a hub id.
            index: A published index's URI; not needed with k=0.
            k: Retrieved captions per prompt; by default the checkpoint's.
            generation: How captions are decoded; by default as the checkpoint says.
            device: A torch device.
            dtype: `float32`, `bfloat16` or `float16`; `auto` is what `smallcap.machine.precision` finds fastest here.
            retrieval_encoder: Its spec; by default the one that the index names.
            cache_dir: Where copies of remote indexes are kept.
            index_id: The index's version; by default the current one.
            compile_encoders: Run the encoders through torch.compile; pays off in long runs.
            search_device: Where the index is searched; `auto` is the model's GPU where both fit on it, else the CPU.
            retriever: The index opened already, in the place of `index`.
            clip_score: Embed each caption, too, for its cosine with the image.

        Raises:
            CheckpointError: The model or the encoder cannot be loaded.
            ManifestError: There is no published index.
            IndexIntegrityError: The index is damaged, or was built with another encoder.
        """
        encoder = None
        dtype = resolve_dtype(dtype, device)
        if k != 0 and (index is not None or retriever is not None):  # the index is checked before any model is loaded
            manifest = retriever.manifest if retriever else load_manifest(index or "", index_id)
            spec = retrieval_encoder or manifest.encoder.spec
            identity = resolve_encoder_identity(spec)
            manifest.check_encoder(identity, where=index or manifest.index_id)
            retriever = retriever or Retriever.open(index or "", cache_dir=cache_dir, index_id=manifest.index_id)
            encoder = load_retrieval_encoder(spec, device, dtype)
        elif retrieval_encoder is not None:
            encoder = load_retrieval_encoder(retrieval_encoder, device, dtype)
        loaded = load_checkpoint(model, device, dtype)
        if isinstance(retriever, Retriever):
            retriever.use_device(device, search_device)
        tokenizer = load_tokenizer(tokenizer_source(model))
        k = (loaded.config.k if loaded.config.rag else 0) if k is None else k
        captioner = cls(loaded, tokenizer, encoder, retriever, k, generation, clip_score)
        captioner.pack()
        if compile_encoders:
            captioner.compile_encoders()
        return captioner

    def pack(self) -> None:
        """Lays the weights out for this CPU, where that can be done; see `SmallCapModel.pack`."""
        self.model.pack()
        if self.retrieval_encoder is not None:
            self.retrieval_encoder.pack()

    def compile_encoders(self) -> None:
        """Compiles the vision towers with torch.compile: slow at first and for each new batch size, faster after."""
        self.model.encoder.transformer.compile()
        if self.retrieval_encoder is not None and not self._shares_encoder:
            self.retrieval_encoder.vision_tower.compile()

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
        return self._caption(self._prepare(pixels, exclude_image_ids))

    def caption_batches(
        self, batches: Iterable[tuple[Sequence[Pixels], Sequence[str | None] | None]]
    ) -> Iterator[list[CaptionResult]]:
        """Captions batch after batch; on a GPU the next one is uploaded, encoded and searched for meanwhile.

        Args:
            batches: The arguments of `caption_batch`.

        Yields:
            Each batch's results, in order.
        """
        if self.model.device.type != "cuda":
            for batch in batches:
                yield self.caption_batch(*batch)
            return
        with ThreadPoolExecutor(1, "prepare") as thread:
            ahead: Future[PreparedBatch | None] | None = None
            for batch in batches:
                following = thread.submit(self._prepare_beside, *batch)
                if ahead is not None:
                    yield self._caption(ahead.result())
                ahead = following
            if ahead is not None:
                yield self._caption(ahead.result())

    @torch.inference_mode()
    def _prepare(
        self, pixels: Sequence[Pixels], exclude_image_ids: Sequence[str | None] | None
    ) -> PreparedBatch | None:
        """Encodes, embeds, retrieves and prompts: all that comes before the first token; None for no images."""
        if not pixels:
            return None
        hidden_states, queries = self.encode(pixels)
        neighbours = self._retrieve(queries, exclude_image_ids, len(pixels))
        texts = [[neighbour.text for neighbour in of_image] for of_image in neighbours]
        config = self.model.config
        prompts = build_prompts(self.tokenizer, config.template, texts, config.bos_token_id)
        keys = [image_key(one) for one in pixels] if self.generation.strategy is Sampling else None
        sizes = [(one.width, one.height) for one in pixels]
        return PreparedBatch(hidden_states, queries, neighbours, prompts, keys, sizes)

    def _prepare_beside(
        self, pixels: Sequence[Pixels], exclude_image_ids: Sequence[str | None] | None
    ) -> PreparedBatch | None:
        """Does the same on a CUDA stream of its own, from another thread."""
        if self._beside is None:
            self._beside = torch.cuda.Stream(self.model.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._beside):
            prepared = self._prepare(pixels, exclude_image_ids)
        self._beside.synchronize()
        return prepared

    @torch.inference_mode()
    def _caption(self, batch: PreparedBatch | None) -> list[CaptionResult]:
        """Generates and detokenises."""
        if batch is None:
            return []
        if batch.hidden_states.is_cuda:  # its memory came from another stream
            batch.hidden_states.record_stream(torch.cuda.current_stream(batch.hidden_states.device))
        generated = self.model.generate(batch.hidden_states, batch.prompts, self.generation, batch.keys)
        captions = [[self._to_scored_caption(one) for one in of_image] for of_image in generated]
        clip_scores = self._clip_scores(batch.queries, [best.caption for best, *_ in captions])
        return [
            CaptionResult(
                caption=best.caption,
                logprob=best.logprob,
                num_tokens=best.num_tokens,
                clip_score=clip_scores[i],
                alternatives=tuple(others),
                neighbours=tuple(batch.neighbours[i]),
                embedding=None if batch.queries is None else batch.queries[i],
                width=batch.sizes[i][0],
                height=batch.sizes[i][1],
            )
            for i, (best, *others) in enumerate(captions)
        ]

    def _to_scored_caption(self, generated: Generated) -> ScoredCaption:
        """Detokenises, and takes the length penalty out of the score again."""
        length = len(generated.token_ids)
        caption = decode_caption(self.tokenizer, generated.token_ids, self.generation.eos_token_id)
        return ScoredCaption(caption, generated.score * length**self.generation.length_penalty, length)

    @torch.inference_mode()
    def encode(self, pixels: Sequence[Pixels]) -> tuple[Tensor, np.ndarray | None]:
        """Returns all that the frozen encoders say of images.

        Args:
            pixels: B images' crops, made by this captioner's `crop_plan`.

        Returns:
            Cross-attention's [B, P, Hv] hidden states, and for search [B, dim] float32 unit vectors, or None where
            there is no retrieval encoder.
        """
        hidden_states, class_token = self._encode(pixels)
        return hidden_states, self._embed(pixels, class_token)

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
        if queries is None or self.retrieval_encoder is None or not self._scores_captions:
            return [None] * len(captions)
        embedded = self.retrieval_encoder.encode_texts(captions)
        return [float(score) for score in (queries * embedded).sum(axis=1)]

    def _to_pixel_values(self, crops: np.ndarray, preprocessing: Preprocessing) -> Tensor:
        pixels = torch.from_numpy(crops)
        if self.model.device.type == "cuda":  # from pinned memory the copy runs beside the GPU's work
            pixels = pixels.pin_memory()
        return normalise_pixels(pixels.to(self.model.device, non_blocking=True), preprocessing, self.model.dtype)


def load_crop_plan(model: str, retrieval_encoder: str | None, decode: DecodeMode = "exact") -> CropPlan:
    """Returns the crops that a checkpoint and a retrieval encoder spec take, without loading the weights of either.

    Raises:
        CheckpointError: One of them cannot be found.
    """
    vision = vision_preprocessing(load_config(resolve_folder(model, demo_part="smallcap")).vision)
    return CropPlan.of(vision, load_preprocessing(retrieval_encoder) if retrieval_encoder else None, decode)


def image_key(pixels: Pixels) -> int:
    """Returns an int64 that tells an image apart by its pixels, whatever it is called and wherever it lies."""
    return int.from_bytes(hashlib.blake2b(pixels.vision.tobytes(), digest_size=8).digest(), "little", signed=True)
