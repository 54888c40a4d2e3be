"""How many images fit into free memory, computed from the bytes that captioning one image takes.

The decoder's keys and values are counted to the byte; activations are the few largest tensors that live at once.
Nothing is run, and only the free memory is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from smallcap.captioner import Captioner
from smallcap.decoding.engine import EAGER
from smallcap.decoding.sampling import Sampling
from smallcap.decoding.strategy import GenerationOptions
from smallcap.machine.actor_plan import LARGEST_BATCH
from smallcap.machine.gpu_memory import room_bytes
from smallcap.machine.process_memory import available_bytes
from smallcap.machine.shapes import row_on_gpu, tokens_on_gpu
from smallcap.model.checkpoint import SmallCapConfig

_CAPTION_TOKENS, _TEMPLATE_TOKENS = 25, 10  # of a prompt; by default an index holds no longer captions
# Shares of the free memory. A CPU's memory must also hold decoding tasks, Ray's object store and the index's pages; a
# GPU's allocator cannot use every gap.
_USABLE_ON_CPU, _USABLE_ON_GPU = 0.5, 0.8
_SAMPLING_BYTES = 48  # per logit: probabilities, sorted with their places, and sums in float64


@dataclass(frozen=True)
class VisionTower:
    """The sizes of a vision tower that decide how much memory it takes."""

    image_px: int
    width: int
    patch_px: int | None  # None for a ResNet

    @classmethod
    def from_module(cls, tower: nn.Module, image_px: int) -> VisionTower:
        """Reads the sizes off the tower's first convolution: a transformer's cuts patches, a ResNet's overlaps."""
        first = next(module for module in tower.modules() if isinstance(module, nn.Conv2d))
        if first.kernel_size == first.stride:
            return cls(image_px, first.out_channels, first.kernel_size[0])
        return cls(image_px, 2 * first.out_channels, None)

    @property
    def values(self) -> int:
        """The largest number of values that live at once for one image, its pixels not counted."""
        if self.patch_px is None:
            # three feature maps of the stem, or of the first blocks at half its size and 4 × width
            return 4 * (self.image_px // 2) ** 2 * self.width
        positions = (self.image_px // self.patch_px) ** 2 + 1
        return positions * self.width * 14  # a residual and its norm, and the feed-forward's 4 × width three times


@dataclass(frozen=True)
class ImageMemory:
    """Bytes that captioning takes for each image of a batch."""

    kv_cache: int  # of self-attention: the prompt once, the new tokens of every beam
    cross_attention: int  # keys and values of the image
    logits: int  # of all beams, and what choosing among them needs
    encoder: int  # activations, pixels included
    prefill: int  # activations of the prompts, where all are run at once
    on_gpu: bool = False

    @property
    def bytes(self) -> int:
        """The most that is needed at one time.

        Keys and values are there twice: while finished images leave, or in the tensors that recorded steps work on.
        """
        # Recorded steps keep as much as one of them takes, since they share a pool.
        graphs = self.logits if self.on_gpu else 0
        decoding = 2 * (self.kv_cache + self.cross_attention) + max(self.logits, self.prefill) + graphs
        # On a GPU the next batch is encoded meanwhile.
        return decoding + self.encoder if self.on_gpu else max(decoding, self.encoder)


def image_memory(
    config: SmallCapConfig,
    retrieval: VisionTower | None,
    generation: GenerationOptions,
    prompt_tokens: int,
    dtype: str,
    device: str = "cpu",
) -> ImageMemory:
    """Counts what captioning one image takes.

    Args:
        config: The checkpoint's config.
        retrieval: The retrieval encoder's vision tower; None if it is the model's own or there is none.
        generation: Beams and lengths.
        prompt_tokens: S, the length of the longest prompt.
        dtype: Precision of weights and activations.
        device: `cpu`, or a CUDA device.
    """
    decoder, size = config.decoder, torch.finfo(getattr(torch, dtype)).bits // 8
    on_gpu = device.startswith("cuda")
    if on_gpu:
        prompt_tokens = tokens_on_gpu(prompt_tokens)
    patch_px, image_px = config.vision.get("patch_size", 32), config.vision.get("image_size", 224)
    vision = VisionTower(image_px, decoder.encoder_hidden_size, patch_px)
    positions = (image_px // patch_px) ** 2 + 1  # P
    sequences = generation.num_sequences
    slots = prompt_tokens + sequences * (generation.max_new_tokens - 1)  # T
    if on_gpu:
        slots = row_on_gpu(slots)
    towers = [vision, retrieval] if retrieval else [vision]
    per_logit = 8 if on_gpu else size + 8  # the model's, those in float32, where they differ, and their exponentials
    per_logit += _SAMPLING_BYTES if generation.strategy is Sampling else 0
    per_logit += 4 if generation.no_repeat_ngram_size else 0
    token_values = 6 * decoder.hidden_size + 2 * decoder.ffn_size
    return ImageMemory(
        kv_cache=2 * decoder.num_layers * decoder.hidden_size * slots * size,
        cross_attention=2 * decoder.num_layers * decoder.cross_attention_size * positions * size,
        logits=sequences * decoder.vocab_size * per_logit,
        encoder=max(tower.values * size + 3 * tower.image_px**2 * (1 + 8 + size) for tower in towers)
        + 2 * positions * decoder.encoder_hidden_size * size,
        prefill=prompt_tokens * (token_values + 2 * prompt_tokens) * size if on_gpu else 0,
        on_gpu=on_gpu,
    )


def largest_batch(
    config: SmallCapConfig,
    retrieval: VisionTower | None,
    generation: GenerationOptions,
    prompt_tokens: int,
    free_bytes: int,
    dtype: str,
    device: str = "cpu",
) -> int:
    """Returns how many images can be captioned together in `free_bytes`; see `image_memory` for the other arguments.

    Returns:
        At least 1; at most 64 on a CPU and 512 on a GPU, where larger batches gain little. On a GPU it is a power of
        two, because every batch takes as much as one of the next power of two.
    """
    on_gpu = device.startswith("cuda")
    decoder, size = config.decoder, torch.finfo(getattr(torch, dtype)).bits // 8
    memory = image_memory(config, retrieval, generation, prompt_tokens, dtype, device)
    fixed = 0 if on_gpu else EAGER.prefill_tokens * (6 * decoder.hidden_size + 2 * decoder.ffn_size) * size
    fitting = (free_bytes * (_USABLE_ON_GPU if on_gpu else _USABLE_ON_CPU) - fixed) / memory.bytes
    largest = max(1, min(int(fitting), LARGEST_BATCH["cuda" if on_gpu else "cpu"]))
    return 1 << largest.bit_length() - 1 if on_gpu else largest


def largest_batch_here(captioner: Captioner, actors: int = 1) -> int:
    """Returns how many images a loaded captioner can caption together in the memory that its device has left now.

    Args:
        captioner: The captioner, loaded with its index; what they take is no longer free.
        actors: Number of actors that share the device. On a GPU, 1: each knows its share, see `limit_to_share`.
    """
    model, encoder = captioner.model, captioner.retrieval_encoder
    separate = encoder is not None and encoder.vision_tower is not model.encoder.transformer
    retrieval = (
        VisionTower.from_module(encoder.vision_tower, encoder.preprocessing.size_px) if encoder and separate else None
    )
    device = model.device.type
    free_bytes = room_bytes(model.device) if device == "cuda" else available_bytes()
    prompt_tokens = _TEMPLATE_TOKENS + captioner.k * _CAPTION_TOKENS
    dtype = str(model.dtype).removeprefix("torch.")
    return largest_batch(
        model.config, retrieval, captioner.generation, prompt_tokens, free_bytes // actors, dtype, device
    )
