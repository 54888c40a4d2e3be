"""What all ways of choosing tokens share: options, the interface to the engine, and a fast and exact top-k.

A decoding strategy turns logits into the next tokens of N sequences per image and keeps what has been generated. The
engine does not know how it chooses; a strategy sees scores and token ids, never a model or text. Its state is tensors
with one row per image, so that images can leave the batch and a step can be recorded as a CUDA graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 256  # logits; a chunk's maximum decides whether its members can be among the k largest
_CPU_ROWS = 48  # of logits at once on a CPU: a batch's as float32 are 38 MB, which no cache holds


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled; see `smallcap.decoding.sampling`."""

    temperature: float = 1.0
    top_p: float = 1.0  # share of the probability that is sampled from, the most likely tokens first
    seed: int = 0


@dataclass(frozen=True)
class GenerationOptions:
    """How to decode; `smallcap.config.GenerationConfig` is the users' view of it."""

    num_beams: int
    max_new_tokens: int
    length_penalty: float
    eos_token_id: int
    pad_token_id: int
    no_repeat_ngram_size: int = 0  # no caption repeats a sequence of n tokens; 0 allows it
    num_captions: int = 1  # returned per image, best first
    strategy: type[DecodingStrategy] | None = None  # None is beam search
    sampling: SamplingOptions = SamplingOptions()  # for the strategy that samples

    @property
    def num_sequences(self) -> int:
        """N, the sequences that are extended together for each image."""
        return self.num_beams if self.strategy is None else self.strategy.count_sequences(self)


@dataclass(frozen=True)
class Hypotheses:
    """The C best captions of each of B images, best first."""

    token_ids: Tensor  # [B, C, max_new_tokens] int64; what follows `lengths` is undefined
    lengths: Tensor  # [B, C] int64, the eos included
    scores: Tensor  # [B, C] float32, the sum of log probabilities over length ** length_penalty


class DecodingStrategy(ABC):
    """N growing sequences for each of B images.

    Attributes:
        step: Number of tokens that each sequence has.
        tokens: [B, N, max_new_tokens] int64, of which the first `step` are generated.
        done: [B] bool, images whose result no longer changes.
        per_image: Names of the attributes that have one row per image.
    """

    per_image: tuple[str, ...] = ("tokens", "done")

    def __init__(self, options: GenerationOptions, keys: Tensor) -> None:
        """Starts with the prompts.

        Args:
            options: How to decode.
            keys: [B] int64, numbers that tell the images apart in any batch.
        """
        self.options = options
        self.step = 0
        shape = (len(keys), options.num_sequences, options.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=keys.device)
        self.done = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)

    @staticmethod
    def count_sequences(options: GenerationOptions) -> int:
        """Returns N, the sequences of each image."""
        return options.num_beams

    @abstractmethod
    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Extends every sequence by one token.

        Args:
            logits: [B, N, V]; [B, 1, V] at the first step, where all sequences are still the prompt.

        Returns:
            The sequences' new tokens and the sequences they extend, both [B, N] int64.
        """

    @abstractmethod
    def best(self) -> Hypotheses:
        """Returns the `num_captions` best captions of each image so far."""

    def keep(self, rows: Tensor) -> None:
        """Drops all images but `rows` ([kept] int64)."""
        for name in self.per_image:
            setattr(self, name, getattr(self, name)[rows])

    def _without_repeats(self, logits: Tensor) -> Tensor:
        """Returns the logits with -inf for each token that would repeat n tokens of its caption."""
        n = self.options.no_repeat_ngram_size
        if n == 0 or self.step < n:
            return logits
        ngrams = self.tokens[:, :, : self.step].unfold(2, n, 1)  # [B, N, step - n + 1, n]
        latest = self.tokens[:, :, None, self.step - n + 1 : self.step]  # [B, N, 1, n - 1]
        repeats = (ngrams[..., :-1] == latest).all(-1)
        bans = torch.where(repeats, -torch.inf, torch.inf).to(logits.dtype)
        return logits.scatter_reduce(-1, ngrams[..., -1], bans, "amin")


def top_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the k largest of each row of logits, and the row's normaliser, in few passes over a large vocabulary.

    The k largest values lie in the k chunks with the largest maxima, so only those are searched.

    Args:
        logits: [..., V], of any floating-point dtype.
        k: Number of logits to find, at most V.

    Returns:
        Values [..., k] float32 in descending order, their indices [..., k] int64, and log(sum(exp(logits))) [..., 1]
        float32.
    """
    if logits.is_cuda:
        return _top_of_rows(logits.float(), k)
    blocks = torch.split(logits.flatten(0, -2), _CPU_ROWS)
    found = zip(*(_top_of_rows(block.float(), k) for block in blocks), strict=True)
    values, indices, normaliser = (torch.cat(parts).view(*logits.shape[:-1], -1) for parts in found)
    return values, indices, normaliser


def _top_of_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `top_logits` does for [..., V] float32, all at once."""
    size = logits.shape[-1]
    chunks = size // _CHUNK
    if chunks < 4 * k:
        top = logits.topk(k, dim=-1)
        return top.values, top.indices, logits.logsumexp(-1, keepdim=True)
    tail = torch.arange(chunks * _CHUNK, size, device=logits.device)
    chunked = logits[..., : chunks * _CHUNK].view(*logits.shape[:-1], chunks, _CHUNK)
    maxima = chunked.amax(-1)  # [..., chunks]
    nearest = maxima.topk(k, dim=-1).indices  # [..., k]
    inside = torch.arange(_CHUNK, device=logits.device)
    indices = (nearest[..., None] * _CHUNK + inside).flatten(-2)  # [..., k * _CHUNK]
    indices = torch.cat([indices, tail.expand(*indices.shape[:-1], -1)], -1)
    top = logits.gather(-1, indices).topk(k, dim=-1)
    largest = top.values[..., :1]
    normaliser = (logits - largest).exp_().sum(-1, keepdim=True).log_() + largest
    return top.values, indices.gather(-1, top.indices), normaliser
