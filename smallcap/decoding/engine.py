"""Batched caption generation: prefill once per image, then one token per sequence and step.

The engine sees encoder hidden states and token ids, never pixels or text. An image's cross-attention and prompt keys
and values are computed once and shared by its beams. Prompts of similar length are prefilled together, so that little
of the arithmetic is padding. Finished images leave the batch, so that a few long captions do not keep other rows busy.
A `Stepper` runs the steps and says which shapes occur: on a CPU every size, on a GPU a few, whose steps are recorded as
CUDA graphs (`smallcap.decoding.cuda_graphs`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from smallcap.decoding.beam_search import BeamSearch
from smallcap.decoding.kv_cache import KVCache, PromptSlots
from smallcap.decoding.strategy import DecodingStrategy, GenerationOptions
from smallcap.decoding.text_decoder import CrossAttentionKV, TextDecoder
from smallcap.errors import ConfigError

_COMPACT_AT = 1 / 8  # share of rows that a batch must lose, so that copying the others together pays


@dataclass(frozen=True)
class Generated:
    """One generated caption."""

    token_ids: list[int]  # without the prompt, the eos included where it was produced
    score: float  # sum of log probabilities over length ** length_penalty


class DecodingState:
    """A batch between two steps: everything that a step reads or writes.

    Attributes:
        images: The image of each row. A batch may have more rows, which belong to no image.
        cross_kv: Keys and values of the images, per layer.
        cache: Keys and values of the text so far.
        strategy: The sequences so far.
        position: [B] int64, positions of the newest tokens, counted from 0 at the first real one.
        tokens, parents: [B, N] int64, the newest tokens and the sequences they extend; set by `choose`.
    """

    tokens: Tensor
    parents: Tensor

    def __init__(
        self,
        images: list[int],
        cross_kv: CrossAttentionKV,
        cache: KVCache,
        strategy: DecodingStrategy,
        position: Tensor,
    ) -> None:
        self.images, self.cross_kv, self.cache, self.strategy = images, cross_kv, cache, strategy
        self.position = position

    def choose(self, logits: Tensor) -> None:
        """Chooses the next tokens by [B, N or 1, V] logits."""
        self.tokens, self.parents = self.strategy.advance(logits)

    def step(self, decoder: TextDecoder) -> None:
        """Feeds every sequence its newest token and chooses the next one."""
        visible = self.cache.open_step(self.parents)[:, None]
        mask = additive_mask(visible, self.cache.keys.dtype)  # [B, 1, N, T]
        positions = self.position[:, None].expand_as(self.tokens)
        hidden = decoder(self.tokens, positions, mask, self.cross_kv, self.cache)
        self.position = self.position + 1
        self.choose(decoder.logits(hidden))

    def alias(self) -> DecodingState:
        """Returns a state with the same tensors; replacing them there does not change this state."""
        other = copy.copy(self)
        other.cache, other.strategy = copy.copy(self.cache), copy.copy(self.strategy)
        return other

    def take(self, rows: Sequence[int]) -> DecodingState:
        """Returns a state with copies of the rows, in that order."""
        taken = self.alias()
        index = torch.tensor(rows, device=self.position.device)
        taken.images = [self.images[row] for row in rows if row < len(self.images)]
        taken.position, taken.tokens, taken.parents = self.position[index], self.tokens[index], self.parents[index]
        taken.cross_kv = [(keys[index], values[index]) for keys, values in self.cross_kv]
        taken.cache.keep(index)
        taken.strategy.keep(index)
        return taken

    def load(self, other: DecodingState) -> None:
        """Copies a state with at most as many rows into this one's tensors; surplus rows repeat its last row."""
        count = len(other.position)
        rows = torch.arange(len(self.position), device=self.position.device).clamp(max=count - 1)
        for target, source in zip(self.changed_by_steps(), other.changed_by_steps(), strict=True):
            target.copy_(source[rows])
        filled = other.cache.length
        for target, source in ((self.cache.keys, other.cache.keys), (self.cache.values, other.cache.values)):
            target[:, :count, :, :filled] = source[:, :, :, :filled]
        for target_layer, source_layer in zip(self.cross_kv, other.cross_kv, strict=True):
            for target, source in zip(target_layer, source_layer, strict=True):
                target[:count] = source
        self.images, self.cache.length, self.strategy.step = other.images, filled, other.strategy.step

    def changed_by_steps(self) -> list[Tensor]:
        """Returns the tensors that a step overwrites; keys and values are only appended."""
        strategy = self.strategy
        strategy_tensors = [getattr(strategy, name) for name in strategy.per_image]
        return [self.tokens, self.parents, self.position, self.cache.visible, *strategy_tensors]


class Stepper(Protocol):
    """Runs steps, and says in which shapes.

    Attributes:
        steps_per_check: Steps between two checks for finished images; each check waits for the device.
        prefill_tokens: The most prompt tokens at once; similar prompts are prefilled together.
    """

    steps_per_check: int
    prefill_tokens: int

    def rows(self, images: int) -> int:
        """Returns how many rows a batch of so many images has; those beyond them repeat the last image."""

    def slots(self, tokens: int) -> int:
        """Returns to how many tokens prompts are padded whose longest has so many."""

    def advance(self, decoder: TextDecoder, state: DecodingState, steps: int) -> DecodingState:
        """Advances a state; may return another state, whose tensors the stepper owns."""


class EagerStepper:
    """Runs steps one operation after another, in the shapes that come.

    Args:
        prefill_tokens: The most prompt tokens at once.
    """

    steps_per_check = 1

    def __init__(self, prefill_tokens: int) -> None:
        self.prefill_tokens = prefill_tokens

    def rows(self, images: int) -> int:
        """Returns the number of images."""
        return images

    def slots(self, tokens: int) -> int:
        """Returns the number of tokens."""
        return tokens

    def advance(self, decoder: TextDecoder, state: DecodingState, steps: int) -> DecodingState:
        """Advances a state in place."""
        for _ in range(steps):
            state.step(decoder)
        return state


ALL_TOKENS = sys.maxsize  # of a batch's prompts: a GPU wants large matrices
EAGER = EagerStepper(prefill_tokens=1024)  # enough rows for a CPU's matrix units


@torch.inference_mode()
def generate(
    decoder: TextDecoder,
    encoder_hidden_states: Tensor,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    keys: Sequence[int] | None = None,
    stepper: Stepper = EAGER,
) -> list[list[Generated]]:
    """Generates the best captions of each image.

    Args:
        decoder: The text decoder, in eval mode.
        encoder_hidden_states: [B, P, Hv], on the decoder's device and in its dtype.
        prompts: B lists of token ids, at least one in each.
        options: Beams or sampling, lengths and special tokens.
        keys: B int64 numbers that tell images apart when sampling; by default their positions in the batch.
        stepper: Runs the steps.

    Returns:
        B lists of `options.num_captions` captions, best first; each is what a batch of that image alone would give.

    Raises:
        ConfigError: A prompt is empty or does not fit the decoder's positions, or the number of prompts is not B.
    """
    _check_prompts(decoder, encoder_hidden_states, prompts, options)
    if not prompts:
        return []
    state = prefill(decoder, encoder_hidden_states, prompts, options, keys, stepper)
    results: list[list[Generated]] = [[] for _ in prompts]
    while state.strategy.step < options.max_new_tokens:
        done = state.strategy.done.tolist()[: len(state.images)]  # the only place where the host waits for the device
        live = [row for row, is_done in enumerate(done) if not is_done]
        rows = len(state.position)
        if rows - stepper.rows(len(live)) >= _COMPACT_AT * rows:
            _collect(state, [row for row, is_done in enumerate(done) if is_done], results)
            if not live:
                return results
            state = state.take(live)
        steps = min(stepper.steps_per_check, options.max_new_tokens - state.strategy.step)
        state = stepper.advance(decoder, state, steps)
    _collect(state, range(len(state.images)), results)
    return results


def prefill(
    decoder: TextDecoder,
    encoder_hidden_states: Tensor,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    keys: Sequence[int] | None = None,
    stepper: Stepper = EAGER,
) -> DecodingState:
    """Runs the prompts through the decoder and chooses each sequence's first token; see `generate` for the arguments.

    Returns:
        The state of the batch, its images ordered by prompt length, longest first.
    """
    device = encoder_hidden_states.device
    images = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    order = images + images[-1:] * (stepper.rows(len(images)) - len(images))
    prompts = [prompts[row] for row in order]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    slots = stepper.slots(len(prompts[0]))
    prompt_mask = torch.arange(slots, device=device) >= slots - lengths[:, None]  # [B, S]
    rows = torch.tensor(order, device=device)
    cross_kv = decoder.cross_attention_kv(encoder_hidden_states[rows])
    config = decoder.config
    cache = KVCache(
        (config.num_layers, config.num_heads, config.head_dim),
        prompt_mask,
        options.num_sequences,
        options.max_new_tokens - 1,
        encoder_hidden_states.dtype,
    )
    image_keys = torch.arange(len(images)) if keys is None else torch.tensor(list(keys))
    strategy = (options.strategy or BeamSearch)(options, image_keys.to(device)[rows])
    state = DecodingState(images, cross_kv, cache, strategy, lengths)

    last_hidden = []
    for group in _groups(prompts, stepper.prefill_tokens):
        ids, mask = pad_prompts(prompts[group], options.pad_token_id, device, stepper.slots(len(prompts[group.start])))
        group_cross_kv = [(keys_of_layer[group], values_of_layer[group]) for keys_of_layer, values_of_layer in cross_kv]
        hidden = decoder(
            ids,
            mask.cumsum(1).sub(1).clamp(min=0),
            additive_mask(causal_mask(mask), cache.keys.dtype),
            group_cross_kv,
            PromptSlots(cache, group, ids.shape[1]),
            last_only=True,
        )
        last_hidden.append(hidden)
    state.choose(decoder.logits(torch.cat(last_hidden)))
    return state


def _groups(prompts: Sequence[Sequence[int]], tokens: int) -> list[slice]:
    """Cuts prompts, longest first, into groups of at most so many tokens that are prefilled together.

    The number of prompts in a group only decides its shape, so captions do not depend on it.
    """
    groups, start = [], 0
    while start < len(prompts):
        end = start + max(1, tokens // len(prompts[start]))
        groups.append(slice(start, min(end, len(prompts))))
        start = end
    return groups


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pads prompts on the left to one length, by default that of the longest.

    Returns:
        Token ids [B, S] int64 and a mask [B, S] bool that is False at the padding.
    """
    length = length or max(len(prompt) for prompt in prompts)
    padded = [[pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(length)[None] >= (length - lengths)[:, None]
    return torch.tensor(padded, dtype=torch.int64).to(device), mask.to(device)


def causal_mask(token_mask: Tensor) -> Tensor:
    """Returns [B, 1, S, S] bool: each token sees itself and the real tokens before it.

    Padding sees itself, because a softmax over nothing would be NaN and spread; nothing else sees the padding.
    """
    length = token_mask.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=token_mask.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=token_mask.device)
    return ((before & token_mask[:, None]) | itself)[:, None]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 0 where `visible` and -inf elsewhere, to be added to attention scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _collect(state: DecodingState, rows: Sequence[int], results: list[list[Generated]]) -> None:
    """Stores the best hypotheses of some rows of the batch as the results of their images."""
    best = state.strategy.best()
    chosen = torch.tensor(list(rows), dtype=torch.int64, device=state.position.device)
    columns = (x[chosen].tolist() for x in (best.token_ids, best.lengths, best.scores))
    for row, token_ids, lengths, scores in zip(rows, *columns, strict=True):
        captions = zip(token_ids, lengths, scores, strict=True)
        results[state.images[row]] = [Generated(ids[:length], score) for ids, length, score in captions]


def _check_prompts(
    decoder: TextDecoder, encoder_hidden_states: Tensor, prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> None:
    if len(prompts) != len(encoder_hidden_states):
        raise ConfigError(
            "There must be one prompt per image.", expected=str(len(encoder_hidden_states)), found=str(len(prompts))
        )
    lengths = [len(prompt) for prompt in prompts]
    if prompts and min(lengths) == 0:
        raise ConfigError("A prompt is empty.", where=f"prompt {lengths.index(0)}", expected="at least one token")
    longest = max(lengths, default=0) + options.max_new_tokens - 1
    if longest > decoder.config.max_positions:
        raise ConfigError(
            "A prompt and its caption do not fit the decoder's positions.",
            expected=f"at most {decoder.config.max_positions} tokens",
            found=f"{longest} tokens",
            remedy="Retrieve fewer captions (-k), or index shorter ones.",
        )
