"""Batched caption generation: prefill once per image, then one token per beam and step.

The engine sees encoder hidden states and token ids, never pixels or text. Ragged prompts share a batch by left padding;
an image's cross-attention and prompt keys and values are computed once and shared by its beams; finished images leave
the batch, so that a few long captions do not keep the others' rows busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smallcap.beam_search import BeamSearch
from smallcap.errors import ConfigError
from smallcap.kv_cache import KVCache
from smallcap.text_decoder import CrossAttentionKV, TextDecoder

_COMPACT_AT = 1 / 8  # share of finished rows at which copying the others together pays


@dataclass(frozen=True)
class GenerationOptions:
    """How to decode; see `smallcap.config.GenerationConfig` for the users' view of it."""

    num_beams: int
    max_new_tokens: int
    length_penalty: float
    eos_token_id: int
    pad_token_id: int


@dataclass(frozen=True)
class Generated:
    """One generated caption."""

    token_ids: list[int]  # without the prompt, the eos included where it was produced
    score: float  # sum of log probabilities over length ** length_penalty


@torch.inference_mode()
def generate(
    decoder: TextDecoder,
    encoder_hidden_states: Tensor,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> list[Generated]:
    """Generates the best caption of each image.

    Args:
        decoder: The text decoder, in eval mode.
        encoder_hidden_states: [B, P, Hv], on the decoder's device and in its dtype.
        prompts: B lists of token ids, of any lengths of at least 1.
        options: Beams, lengths and special tokens.

    Returns:
        B captions, in order; each is what a batch of that image alone would give.

    Raises:
        ConfigError: A prompt is empty, does not fit the decoder's positions, or their number is not B.
    """
    _check_prompts(decoder, encoder_hidden_states, prompts, options)
    if not prompts:
        return []
    input_ids, prompt_mask = pad_prompts(prompts, options.pad_token_id, encoder_hidden_states.device)
    position_ids = prompt_mask.cumsum(1).sub(1).clamp(min=0)  # [B, S]
    cross_kv = decoder.cross_attention_kv(encoder_hidden_states)
    config = decoder.config
    cache = KVCache(
        (config.num_layers, config.num_heads, config.head_dim),
        prompt_mask,
        options.num_beams,
        options.max_new_tokens - 1,
        encoder_hidden_states.dtype,
    )
    search = BeamSearch(
        len(prompts),
        options.num_beams,
        options.max_new_tokens,
        options.eos_token_id,
        options.length_penalty,
        encoder_hidden_states.device,
    )
    logits = prefill(decoder, input_ids, position_ids, prompt_mask, cross_kv, cache)
    next_tokens, parents = search.advance(logits[:, None])

    results: list[Generated | None] = [None] * len(prompts)
    rows = torch.arange(len(prompts), device=input_ids.device)  # which image each row of the batch is
    next_position = position_ids[:, -1] + 1  # [B]
    for _ in range(options.max_new_tokens - 1):
        if search.done.float().mean() >= _COMPACT_AT:
            _collect(search, rows, search.done, results)
            live = (~search.done).nonzero().flatten()
            if not len(live):
                break
            rows, next_position, next_tokens, parents = (x[live] for x in (rows, next_position, next_tokens, parents))
            cross_kv = [(keys[live], values[live]) for keys, values in cross_kv]
            cache.keep(live)
            search.keep(live)
        logits = decode(decoder, next_tokens, parents, next_position, cross_kv, cache)
        next_tokens, parents = search.advance(logits)
        next_position = next_position + 1
    _collect(search, rows, torch.ones_like(search.done), results)
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def prefill(
    decoder: TextDecoder,
    input_ids: Tensor,  # [B, S]
    position_ids: Tensor,  # [B, S]
    prompt_mask: Tensor,  # [B, S] bool
    cross_kv: CrossAttentionKV,
    cache: KVCache,
) -> Tensor:
    """Runs the prompts through the decoder, fills the cache, and returns the last position's logits, [B, V]."""
    length = input_ids.shape[1]
    mask = additive_mask(causal_mask(prompt_mask), cache.keys.dtype)
    hidden = decoder(input_ids, position_ids, mask, cross_kv, cache)
    assert cache.length == length
    return decoder.logits(hidden[:, -1])


def decode(
    decoder: TextDecoder,
    tokens: Tensor,  # [B, N]
    parents: Tensor,  # [B, N]
    position: Tensor,  # [B]
    cross_kv: CrossAttentionKV,
    cache: KVCache,
) -> Tensor:
    """Feeds every beam its newest token and returns the logits of the next one, [B, N, V]."""
    mask = additive_mask(cache.open_step(parents)[:, None], cache.keys.dtype)  # [B, 1, N, T]
    hidden = decoder(tokens, position[:, None].expand_as(tokens), mask, cross_kv, cache)
    return decoder.logits(hidden)


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads prompts on the left to one length.

    Returns:
        Token ids [B, S] int64 and a mask [B, S] bool that is False at the padding.
    """
    longest = max(len(prompt) for prompt in prompts)
    padded = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(longest)[None] >= (longest - lengths)[:, None]
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


def _collect(search: BeamSearch, rows: Tensor, which: Tensor, results: list[Generated | None]) -> None:
    """Writes the best hypotheses of the rows marked in `which` ([B] bool) to their images' places in `results`."""
    best = search.best()
    marked = zip(*(x[which].tolist() for x in (rows, best.token_ids, best.lengths, best.scores)), strict=True)
    for row, token_ids, length, score in marked:
        results[row] = Generated(token_ids[:length], score)


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
