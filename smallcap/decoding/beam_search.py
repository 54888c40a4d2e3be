"""Beam search as tensor bookkeeping: scores in, next tokens and parent beams out; one beam decodes greedily.

Its semantics are the reference implementation's: 2N candidates per image and step; a candidate that ends with eos is
finished only if it ranks among the first N; an image is done once N hypotheses have finished (early stopping); at the
last step, unfinished hypotheses compete as they stand.

Source: transformers 4.21.1 `BeamSearchScorer`, as RitaRamo/smallcap calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smallcap.decoding.strategy import DecodingStrategy, GenerationOptions, Hypotheses, top_logits


class BeamSearch(DecodingStrategy):
    """The live and finished hypotheses of B images with N beams each.

    Attributes:
        scores: [B, N] float32, the sums of log probabilities of the live beams.
        tokens: [B, N, max_new_tokens] int64, what they have generated so far.
        done: [B] bool, images with N finished hypotheses.
    """

    per_image: tuple[str, ...] = (
        "tokens",
        "done",
        "scores",
        "_finished_scores",
        "_finished_lengths",
        "_finished_tokens",
    )

    def __init__(self, options: GenerationOptions, keys: Tensor) -> None:
        super().__init__(options, keys)
        batch, device = len(keys), keys.device
        self.num_beams = options.num_beams
        self.scores = torch.zeros(batch, 1, device=device)  # the prompt alone: one live beam, until the first step
        self._finished_scores = torch.full((batch, self.num_beams), -torch.inf, device=device)
        self._finished_lengths = torch.zeros(batch, self.num_beams, dtype=torch.int64, device=device)
        self._finished_tokens = torch.zeros_like(self.tokens)

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Extends every beam by one token, and drops the beams that fell behind."""
        candidate_scores, candidate_tokens, candidate_parents = self._candidates(logits)
        is_eos = candidate_tokens == self.options.eos_token_id  # [B, 2N]
        self._collect_finished(candidate_scores, candidate_parents, is_eos)

        # The first N candidates without eos, in rank order: each beam offers at most one eos, so N always remain.
        rank = torch.arange(candidate_tokens.shape[1], device=logits.device)
        rank_live_first = torch.where(is_eos, rank + len(rank), rank)
        chosen = rank_live_first.topk(self.num_beams, dim=1, largest=False, sorted=True).indices  # [B, N]
        self.scores = candidate_scores.gather(1, chosen)
        parents = candidate_parents.gather(1, chosen)
        next_tokens = candidate_tokens.gather(1, chosen)
        self.tokens = self.tokens.gather(1, parents[:, :, None].expand_as(self.tokens))
        self.tokens[:, :, self.step] = next_tokens
        self.step += 1
        return next_tokens, parents

    def best(self) -> Hypotheses:
        """Returns the best hypotheses of each image; live beams compete as they are where the image is not done."""
        live_scores = self.scores / self._length_norm(self.step)
        live_scores = live_scores.masked_fill(self.done[:, None], -torch.inf)
        live_lengths = torch.full_like(self._finished_lengths, self.step)
        scores, best = torch.cat([self._finished_scores, live_scores], 1).topk(self.options.num_captions, dim=1)
        lengths = torch.cat([self._finished_lengths, live_lengths], 1).gather(1, best)
        tokens = torch.cat([self._finished_tokens, self.tokens], 1)
        return Hypotheses(tokens.gather(1, best[:, :, None].expand(-1, -1, tokens.shape[2])), lengths, scores)

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the 2N best continuations per image, best first: scores, tokens, parents, each [B, 2N]."""
        num_candidates = 2 * self.num_beams
        # Each beam's 2N best include the image's 2N best, and the normaliser shifts all logits of a beam alike.
        offered = min(num_candidates, logits.shape[-1])
        values, tokens, normaliser = top_logits(self._without_repeats(logits), offered)
        scores = (values - normaliser + self.scores[:, :, None]).flatten(1)  # [B, N * 2N]
        best = scores.topk(num_candidates, dim=1)
        return best.values, tokens.flatten(1).gather(1, best.indices), best.indices // offered

    def _collect_finished(self, scores: Tensor, parents: Tensor, is_eos: Tensor) -> None:
        """Moves candidates that end with eos among the first N to the finished hypotheses, and keeps the best N."""
        n = self.num_beams
        ends = is_eos[:, :n] & ~self.done[:, None]
        ended_scores = (scores[:, :n] / self._length_norm(self.step + 1)).masked_fill(~ends, -torch.inf)
        ended_tokens = self.tokens.gather(1, parents[:, :n, None].expand_as(self.tokens))
        ended_tokens[:, :, self.step] = self.options.eos_token_id
        ended_lengths = torch.full_like(self._finished_lengths, self.step + 1)

        pool_scores = torch.cat([self._finished_scores, ended_scores], dim=1)  # [B, 2N]
        self._finished_scores, kept = pool_scores.topk(n, dim=1)
        self._finished_lengths = torch.cat([self._finished_lengths, ended_lengths], dim=1).gather(1, kept)
        pool_tokens = torch.cat([self._finished_tokens, ended_tokens], dim=1)
        self._finished_tokens = pool_tokens.gather(1, kept[:, :, None].expand_as(self._finished_tokens))
        self.done = (self._finished_scores > -torch.inf).all(dim=1)

    def _length_norm(self, length: int) -> float:
        return float(length**self.options.length_penalty)
