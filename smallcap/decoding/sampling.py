"""Sampling with temperature and top-p, reproducible whatever images share the batch.

The random number behind a token is a hash of the seed, the image's key, the caption's number and the step. It does
not depend on a generator's state, so an image's captions do not change with its batch or its place in it; only a logit
that differs in its last digits can move a token across a boundary.

Source: Holtzman et al. 2020 for top-p; Steele et al. 2014 for SplitMix64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smallcap.decoding.strategy import DecodingStrategy, GenerationOptions, Hypotheses, SamplingOptions

_MANTISSA_BITS = 53


class Sampling(DecodingStrategy):
    """Independent samples of N captions for each of B images.

    Attributes:
        keys: [B] int64, from which each image's random numbers follow.
    """

    per_image = ("tokens", "done", "keys", "_log_probs", "_lengths", "_ended")

    def __init__(self, options: GenerationOptions, keys: Tensor) -> None:
        super().__init__(options, keys)
        self.keys = keys
        shape, device = (len(keys), options.num_captions), keys.device
        self._log_probs = torch.zeros(shape, device=device)
        self._lengths = torch.zeros(shape, dtype=torch.int64, device=device)
        self._ended = torch.zeros(shape, dtype=torch.bool, device=device)

    @staticmethod
    def count_sequences(options: GenerationOptions) -> int:
        """Returns one sequence per caption."""
        return options.num_captions

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the next token of every sequence; one that has ended is carried along unchanged."""
        logits = self._without_repeats(logits.float()).expand(-1, self.options.num_captions, -1)
        tokens = draw(logits, self._uniform(), self.options.sampling)  # [B, N]
        log_probs = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
        alive = ~self._ended
        self._log_probs = self._log_probs + torch.where(alive, log_probs, 0.0)
        self._lengths = self._lengths + alive
        self.tokens[:, :, self.step] = tokens
        self._ended = self._ended | (tokens == self.options.eos_token_id)
        self.done = self._ended.all(1)
        self.step += 1
        itself = torch.arange(self.options.num_captions, device=tokens.device)
        return tokens, itself.expand_as(tokens)

    def best(self) -> Hypotheses:
        """Returns each image's samples, the most likely first."""
        scores = self._log_probs / self._lengths.clamp(min=1) ** self.options.length_penalty
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        tokens = self.tokens.gather(1, order[:, :, None].expand_as(self.tokens))
        return Hypotheses(tokens, self._lengths.gather(1, order), scores)

    def _uniform(self) -> Tensor:
        """Returns the step's random numbers, [B, N] float64 in [0, 1)."""
        samples = torch.arange(self.options.num_captions, device=self.keys.device)
        place = samples * self.options.max_new_tokens + self.step
        image_states = split_mix(self.keys ^ split_mix(torch.full_like(self.keys, self.options.sampling.seed)))
        mixed = split_mix(image_states[:, None] + place)
        return _shift_right(mixed, 64 - _MANTISSA_BITS).double() * 2.0**-_MANTISSA_BITS


def draw(logits: Tensor, uniform: Tensor, options: SamplingOptions) -> Tensor:
    """Draws one token per row from the most likely ones that together have the probability `top_p`.

    Probabilities are added up in the tokens' order. In the order of their size two tokens that are about as likely
    would change places where a logit differs in its last digits, as it does from batch to batch.

    Args:
        logits: [..., V] float32.
        uniform: [...] in [0, 1).
        options: Temperature and top-p.

    Returns:
        [...] int64.
    """
    probs = (logits / options.temperature).softmax(-1).double()
    if options.top_p < 1:
        descending = probs.sort(dim=-1, descending=True).values
        mass_before = descending.cumsum(-1) - descending  # of the more likely tokens
        least = torch.where(mass_before < options.top_p, descending, torch.inf).amin(-1, keepdim=True)
        probs = torch.where(probs < least, 0.0, probs)
    mass = probs.cumsum(-1)
    token = torch.searchsorted(mass, uniform[..., None] * mass[..., -1:], right=True)
    return token.clamp(max=logits.shape[-1] - 1)[..., 0]


def split_mix(values: Tensor) -> Tensor:
    """Returns SplitMix64's next output for each int64 state, as int64; the arithmetic wraps."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ _shift_right(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shift_right(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shifts int64 as if they were unsigned."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
