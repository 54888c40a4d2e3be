"""From images to captions: encode, embed, retrieve, prompt, generate, detokenise.

`Captioner.caption_batch` is the whole algorithm of SmallCap on one screen. It runs in a plain Python loop or in a Ray
actor, and does not know where images come from or where captions go.

Source: Ramos et al. 2023, figure 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smallcap.captioned import CaptionedBatch, CaptionResult, PreparedBatch, ScoredCaptions
from smallcap.captioner_setup import CaptionerOptions, open_search
from smallcap.decoding.cuda_graphs import no_recording
from smallcap.decoding.engine import Generated
from smallcap.decoding.micro_batches import MicroBatches
from smallcap.decoding.sampling import Sampling
from smallcap.errors import ConfigError, RowError
from smallcap.generation_config import GenerationConfig
from smallcap.images.crops import CropPlan, Pixels
from smallcap.images.decode import Preprocessing
from smallcap.images.given import GivenImage, crop_given
from smallcap.images.opening import MAX_IMAGE_PIXELS
from smallcap.index.merged import CaptionSearch, MergedSearch, find_nearest
from smallcap.index.retriever import Neighbours, Retriever
from smallcap.machine.gpu import on_device
from smallcap.machine.precision import choose_kernels, resolve_device, resolve_dtype
from smallcap.machine.side_thread import SideThread
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint, tokenizer_source
from smallcap.model.clip_encoder import RetrievalEncoder, load_retrieval_encoder, normalise_pixels
from smallcap.model.prompt import decode_captions, load_tokenizer
from smallcap.model.prompt_builder import PromptBuilder
from smallcap.options import load_config

if TYPE_CHECKING:
    from smallcap.model.prompt import DecoderTokenizer


Values = Sequence[str | None] | None
Batch = tuple[Sequence[Pixels], Values] | tuple[Sequence[Pixels], Values, Values]
"""The arguments of `Captioner.caption_batch`."""
MORE_ROOM = "Set search_device to cpu, let fewer actors share the GPU (gpus_per_actor)"  # on a GPU


class Captioner:
    """Captions images with a SmallCap model and the captions retrieved from an index.

    The steps of `caption_batch` are public and stand in its order. `Captioner.from_pretrained` loads all components.

    Args:
        model: The SmallCap model.
        tokenizer: The tokenizer of the model's decoder.
        retrieval_encoder: Embeds images for search, and captions for their CLIP score.
        retriever: Searches the index; None to caption without retrieval.
        options: How to caption; the options of loading are ignored.

    Attributes:
        k: Retrieved captions per prompt.
        crop_plan: What images must be cut to.
        generation: How captions are decoded.

    Raises:
        ConfigError: Captions must be retrieved, but the index or its encoder is missing.
    """

    def __init__(
        self,
        model: SmallCapModel,
        tokenizer: DecoderTokenizer,
        retrieval_encoder: RetrievalEncoder | None = None,
        retriever: CaptionSearch | None = None,
        options: CaptionerOptions | None = None,
    ) -> None:
        options = options or CaptionerOptions()
        self.k = (model.config.k if model.config.rag else 0) if options.k is None else options.k
        if self.k and (retriever is None or retrieval_encoder is None):
            raise ConfigError(
                "Retrieval needs an index and its encoder.", where=f"k={self.k}", remedy="Give an index, or set k to 0."
            )
        if options.rerank and (retrieval_encoder is None or not options.clip_score):
            remedy = "Give an index or a retrieval_encoder, and leave clip_score on."
            raise ConfigError("Captions are ranked again by their clip scores.", where="rerank", remedy=remedy)
        choose_kernels(model.dtype, model.device)  # not every model was loaded where it is
        self.model, self.tokenizer = model, tokenizer
        self.retrieval_encoder, self.retriever = retrieval_encoder, retriever
        self.generation = model.generation_options(options)
        self._scores_captions, self._reranks = options.clip_score, options.rerank
        template = model.config.template.with_text(options.template)
        self._prompts = PromptBuilder(tokenizer, template, model.config.bos_token_id)
        self._generating = RLock()
        self._models: tuple[SmallCapModel, ...] = (model,)  # those that generate in turn
        self._preparing = MicroBatches("the encoders or the search", self.free_memory, relief=MORE_ROOM)
        self._decoding = MicroBatches(
            "the decoder", self.free_memory, relief=f"Use fewer beams or captions. {MORE_ROOM}"
        )
        self._scoring = MicroBatches(
            "the text encoder", self.free_memory, relief=f"Set clip_score to false. {MORE_ROOM}"
        )
        self._encoding: Callable[[], AbstractContextManager[None]] = nullcontext
        self._beside = SideThread(model.device, "prepare")
        self.shares_encoder = retrieval_encoder is not None and retrieval_encoder.share_weights_with(model.encoder)
        self.crop_plan = CropPlan.of(
            model.encoder.preprocessing, retrieval_encoder.preprocessing if retrieval_encoder else None
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        index: str | Sequence[str] | CaptionSearch | None = None,
        options: GenerationConfig | None = None,
        **changes: Any,
    ) -> Captioner:
        """Loads a captioner, as in `from_pretrained("demo", "s3://bucket/index", k=4, num_beams=3)`.

        Args:
            model: `demo`, a checkpoint folder, a URI such as `s3://bucket/run/model`, or a hub id.
            index: URI of a published index, or of several with one encoder, or an open index; not needed with k=0.
            options: How to load and to caption, as `CaptionerOptions`, or only how to decode.
            changes: Single options by name; they win over `options`.

        Raises:
            ConfigError: An option is unknown or has a wrong value, or an index is needed and missing.
            CheckpointError: The model or the encoder cannot be loaded.
            StorageError: The store of the model or the index fails.
            ManifestError: There is no published index.
            IndexIntegrityError: The index is damaged, or was built with another encoder.
        """
        options = load_config(CaptionerOptions, flags=changes, base=options.model_dump() if options else None)
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device, options.cache_dir)
        spec, retriever = options.retrieval_encoder, None
        if index and options.k != 0:  # the index is checked before any model is loaded
            retriever, spec = open_search(index, options)
        encoder = load_retrieval_encoder(spec, device, dtype, options.cache_dir) if spec else None
        loaded = load_checkpoint(model, device, dtype, options.cache_dir)
        tokenizer = load_tokenizer(tokenizer_source(model, options.cache_dir), options.cache_dir)
        if isinstance(retriever, Retriever | MergedSearch):
            retriever.use_device(device, options.search_device)
        captioner = cls(loaded, tokenizer, encoder, retriever, options)
        captioner.pack()
        if options.compile_encoders:
            captioner.compile_encoders()
        return captioner

    def pack(self) -> None:
        """Lays the weights out for this device if possible; see `SmallCapModel.pack`."""
        self.model.pack()
        if self.retrieval_encoder is not None:
            self.retrieval_encoder.pack()

    def compile_encoders(self) -> None:
        """Compiles the vision towers with torch.compile: slow at first and for each new batch size, then faster."""
        self._encoding = no_recording  # a batch of a new size is compiled for
        self.model.encoder.transformer.compile()
        if self.retrieval_encoder is not None and not self.shares_encoder:
            self.retrieval_encoder.vision_tower.compile()

    def caption(
        self,
        images: Iterable[GivenImage],
        image_ids: Iterable[str | None] | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
        indexes: Iterable[str | None] | None = None,
        allow_private_hosts: bool = False,
    ) -> list[CaptionResult]:
        """Captions images in one batch; one that cannot be fetched or decoded gets an error instead of a caption.

        Args:
            images: Paths, URIs, encoded image files as bytes, PIL images, or uint8 arrays, in any mix.
            image_ids: Ids of the images. Captions whose source image has the same id are not retrieved for it.
            max_pixels: Files with more pixels become errors.
            indexes: For each image the name of the only index to search, of several; None searches all.
            allow_private_hosts: Whether http(s) URLs may lead to addresses that are not public. Leave it off where
                the URLs are other people's: they could make this machine ask its own network.

        Returns:
            One result per image, in order.

        Raises:
            TypeError: Something is not an image, or a single image is given in place of several.
            ValueError: There are more or fewer ids or names of indexes than images.
            ConfigError: There is no index of such a name.
            StorageError: An object store fails as a whole.
        """
        cropped = crop_given(images, self.crop_plan, max_pixels, allow_private_hosts)
        ids = _for_each(image_ids, cropped, "image_ids", "ids")
        names = _for_each(indexes, cropped, "indexes", "names")
        good = [place for place, one in enumerate(cropped) if isinstance(one, Pixels)]
        pixels = [one for one in cropped if isinstance(one, Pixels)]
        captioned = iter(self.caption_batch(pixels, [ids[place] for place in good], [names[place] for place in good]))
        return [CaptionResult(error=one) if isinstance(one, RowError) else next(captioned) for one in cropped]

    def caption_batch(
        self, pixels: Sequence[Pixels], exclude_image_ids: Values = None, indexes: Values = None
    ) -> list[CaptionResult]:
        """Captions decoded images.

        Args:
            pixels: B images' crops, made by this captioner's `crop_plan`.
            exclude_image_ids: B ids. Captions whose source image has the same id are not retrieved for it.
            indexes: B names: the only index to search for an image, of several; None searches all.

        Returns:
            B results, in order.
        """
        return self.finish(self._prepare(pixels, exclude_image_ids, indexes)).to_results()

    @property
    def halvings(self) -> int:
        """How often a batch was halved because the GPU's memory had run out."""
        return sum(step.halvings for step in (self._preparing, self._decoding, self._scoring))

    def _prepare(
        self, pixels: Sequence[Pixels], exclude_image_ids: Values, indexes: Values = None
    ) -> list[PreparedBatch]:
        """Returns a batch for which captions can be generated: whole, or in parts where memory runs out."""

        def prepare(rows: slice) -> PreparedBatch:
            hidden_states, class_tokens = self.encode(pixels[rows])
            embeddings = self.embed(pixels[rows], class_tokens)
            exclude, names = exclude_image_ids and exclude_image_ids[rows], indexes and indexes[rows]
            neighbours = self.retrieve(embeddings, exclude, names)
            return PreparedBatch(pixels[rows], hidden_states, embeddings, neighbours, self.prompt(neighbours))

        return self._preparing.run(len(pixels), prepare)

    def finish(self, parts: Sequence[PreparedBatch]) -> CaptionedBatch:
        """Returns what becomes of a batch that is prepared, whole or in parts."""
        return CaptionedBatch.join([self._finish_part(part) for part in parts])

    def _finish_part(self, prepared: PreparedBatch) -> CaptionedBatch:
        pixels, embeddings, hidden_states = prepared.pixels, prepared.embeddings, prepared.hidden_states
        if hidden_states.is_cuda:  # its memory may have come from another stream
            hidden_states.record_stream(torch.cuda.current_stream(hidden_states.device))
        every = self.generation.num_sequences if self._reranks else None
        captions = self.detokenise(self.generate(hidden_states, prepared.prompts, pixels, every))
        if every is None:
            captions = captions.fill_empty(lambda images: self._search_again(prepared, images.tolist()))
            scores = self.clip_scores(embeddings, captions.best)
        else:
            scores = self.clip_scores(np.repeat(embeddings, every, axis=0), captions.texts)
            captions, scores = captions.rank(np.asarray(scores), self.generation.num_captions)
        sizes = np.array([(image.width, image.height) for image in pixels], np.int32)
        kept = embeddings if self.retrieval_encoder else None
        return CaptionedBatch(captions, scores, prepared.neighbours, kept, sizes)

    def _search_again(self, prepared: PreparedBatch, images: list[int]) -> ScoredCaptions:
        """Returns all captions that the search finds for some images of a batch, and not only those that are wanted."""
        prompts, pixels = [prepared.prompts[image] for image in images], [prepared.pixels[image] for image in images]
        every = self.generation.num_sequences
        return self.detokenise(self.generate(prepared.hidden_states[images], prompts, pixels, every))

    def take_turns_with(self, others: Iterable[Captioner]) -> None:
        """Lets captioners of one device generate one after the other, and give memory back together."""
        turns = (self, *others)
        for other in turns:
            other._generating = self._generating
            other._models = tuple({id(one.model): one.model for one in turns}.values())

    def free_memory(self) -> None:
        """Gives back what is kept for speed, between two generations."""
        with self._generating:
            for model in self._models:
                model.free_memory()

    @torch.inference_mode()
    def encode(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        """Returns the vision encoder's hidden states [B, P, Hv] for cross-attention, and its class tokens [B, Hv]."""
        encoder = self.model.encoder
        pixel_values = self._to_pixel_values([image.vision for image in pixels], encoder.preprocessing)
        with self._encoding():
            hidden_states, class_tokens = encoder(pixel_values)
        return hidden_states, class_tokens

    @torch.inference_mode()
    def embed(self, pixels: Sequence[Pixels], class_tokens: Tensor) -> np.ndarray:
        """Returns the images' embeddings for search.

        Args:
            pixels: B images' crops.
            class_tokens: [B, Hv], from `encode`; they suffice if both encoders have the same weights.

        Returns:
            [B, dim] float32 unit vectors; dim is 0 if there is no retrieval encoder.
        """
        encoder = self.retrieval_encoder
        if encoder is None:
            return np.empty((len(pixels), 0), np.float32)
        if self.shares_encoder:
            return encoder.project(class_tokens).cpu().numpy()
        crops = [image.vision if image.retrieval is None else image.retrieval for image in pixels]
        pixel_values = self._to_pixel_values(crops, encoder.preprocessing)
        with self._encoding():
            return encoder.encode_images(pixel_values).cpu().numpy()

    def retrieve(self, embeddings: np.ndarray, exclude_image_ids: Values = None, indexes: Values = None) -> Neighbours:
        """Returns the k nearest captions of each of B images, nearest first; `caption_batch` has the arguments."""
        if self.k == 0:
            return Neighbours.none(len(embeddings))
        assert self.retriever is not None
        return find_nearest(self.retriever, embeddings, self.k, exclude_image_ids, indexes)

    def prompt(self, neighbours: Neighbours) -> list[list[int]]:
        """Returns the prompt of each of B images as token ids."""
        return self._prompts.build(neighbours)

    def generate(
        self,
        hidden_states: Tensor,
        prompts: Sequence[Sequence[int]],
        pixels: Sequence[Pixels],
        num_captions: int | None = None,
    ) -> list[list[Generated]]:
        """Returns each image's captions as token ids, best first; where memory runs out, in smaller parts.

        Args:
            hidden_states: [B, P, Hv], from `encode`.
            prompts: B lists of token ids.
            pixels: B images' crops, by which sampling tells images apart.
            num_captions: Captions of each image; by default as the options say.
        """
        options = self.generation if num_captions is None else replace(self.generation, num_captions=num_captions)
        keys = [image.content_key for image in pixels] if self.generation.strategy is Sampling else None
        with self._generating:
            parts = self._decoding.run(
                len(prompts),
                lambda rows: self.model.generate(hidden_states[rows], prompts[rows], options, keys and keys[rows]),
            )
        return [*chain.from_iterable(parts)]

    def detokenise(self, generated: Sequence[Sequence[Generated]]) -> ScoredCaptions:
        """Returns each image's captions as text; their scores lose the length penalty."""
        flat = [caption for captions in generated for caption in captions]
        texts = decode_captions(self.tokenizer, [one.token_ids for one in flat], self.generation.eos_token_id)
        lengths = np.array([len(one.token_ids) for one in flat]).reshape(len(generated), -1)
        scores = np.array([one.score for one in flat]).reshape(lengths.shape)
        return ScoredCaptions(texts, scores * lengths.astype(np.float64) ** self.generation.length_penalty, lengths)

    def clip_scores(self, embeddings: np.ndarray, captions: Sequence[str]) -> np.ndarray | None:
        """Returns the cosine of each embedding, [B, dim], and its caption: [B] float32; None if they are not wanted."""
        encoder = self.retrieval_encoder
        if encoder is None or not self._scores_captions:
            return None
        parts = self._scoring.run(len(captions), lambda rows: encoder.encode_texts(captions[rows]))
        return np.sum(embeddings * np.concatenate([np.empty((0, encoder.dim), np.float32), *parts]), axis=1)

    def caption_batches(self, batches: Iterable[Batch]) -> Iterator[list[CaptionResult]]:
        """Captions batch after batch, see `caption_columns`; yields each batch's results, in order."""
        return (captioned.to_results() for captioned in self.caption_columns(batches))

    def caption_columns(self, batches: Iterable[Batch]) -> Iterator[CaptionedBatch]:
        """Captions batch after batch; on a GPU the next one is uploaded, encoded and searched for meanwhile.

        Several threads may each go through batches of their own: one generates while another does all else.

        Args:
            batches: Arguments of `caption_batch` for each batch.

        Yields:
            What became of each batch, in order.
        """
        if self.model.device.type == "cuda":
            return self._beside.prepare_ahead(batches, self._prepare, self.finish)
        return (self.finish(self._prepare(*batch)) for batch in batches)

    def _to_pixel_values(self, crops: Sequence[np.ndarray], preprocessing: Preprocessing) -> Tensor:
        stacked = self._stack(crops)
        return normalise_pixels(stacked.to(self.model.device, non_blocking=True), preprocessing, self.model.dtype)

    def _stack(self, crops: Sequence[np.ndarray]) -> Tensor:
        """Copies crops once: into [B, S, S, 3] uint8, for a GPU in pinned memory, whose upload does not wait."""
        on_gpu = self.model.device.type == "cuda"
        with on_device(self.model.device):  # whose driver pins the memory
            stacked = torch.empty((len(crops), *crops[0].shape), dtype=torch.uint8, pin_memory=on_gpu)
        np.stack(crops, out=stacked.numpy())
        return stacked


def _for_each(
    values: Iterable[str | None] | None, images: Sequence[object], argument: str, what: str
) -> list[str | None]:
    """Returns a value for each image; None where there are no values."""
    found: list[str | None] = [None] * len(images) if values is None else list(values)
    if len(found) != len(images):
        raise ValueError(f"{argument}: expected {len(images)} {what}, one for each image, found {len(found)}.")
    return found
