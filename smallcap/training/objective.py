"""SmallCap's training objective, cross-entropy on the caption's tokens, and the optimiser's step on cross-attention.

It runs in one process, or in several of torch.distributed with unequal shares. A step's gradient is that of the mean
over the labelled tokens of all workers, whatever the number of workers and accumulated batches.

Source: Ramos et al. 2023, section 3.3; RitaRamo/smallcap train.py and src/utils.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smallcap.decoding.engine import additive_mask
from smallcap.decoding.text_decoder import TextDecoder
from smallcap.model.prompt import IGNORED_LABEL
from smallcap.training.config import OptimizerConfig


def freeze_all_but_cross_attention(decoder: TextDecoder) -> list[nn.Parameter]:
    """Freezes the decoder's language model and returns the parameters to train."""
    decoder.requires_grad_(False)
    trained = list(decoder.cross_attention_parameters().values())
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def weights_sha256(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Returns the hexadecimal sha256 of tensors' names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frozen_sha256(module: nn.Module, decoder: TextDecoder) -> str:
    """Returns the sha256 of all weights of a decoder, or of the model around it, that training must not touch."""
    trained = {id(parameter) for parameter in decoder.cross_attention_parameters().values()}
    return weights_sha256((name, weight) for name, weight in module.named_parameters() if id(weight) not in trained)


def collate(examples: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pads (input ids, labels) pairs on the right; returns two [B, S] int64 tensors."""
    length = max(len(input_ids) for input_ids, _ in examples)
    inputs = [input_ids + [pad_token_id] * (length - len(input_ids)) for input_ids, _ in examples]
    labels = [labels + [IGNORED_LABEL] * (length - len(labels)) for _, labels in examples]
    return torch.tensor(inputs), torch.tensor(labels)


def caption_loss(
    decoder: TextDecoder,
    encoder_hidden_states: Tensor,
    input_ids: Tensor,
    labels: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Returns the cross-entropy over the labelled positions.

    Args:
        decoder: The text decoder; in train mode its dropout is active.
        encoder_hidden_states: [B, P, Hv], in the decoder's dtype.
        input_ids: [B, S] int64, padded on the right, so that padding follows all labels.
        labels: [B, S] int64, -100 where nothing is learnt; not shifted.
        reduction: `mean` over the labelled positions, or their `sum`.

    Returns:
        A scalar, in nats.
    """
    batch, length = input_ids.shape
    position_ids = torch.arange(length, device=input_ids.device).expand(batch, length)
    before = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device).tril()
    mask = additive_mask(before, encoder_hidden_states.dtype)
    hidden = decoder(input_ids, position_ids, mask, decoder.cross_attention_kv(encoder_hidden_states))
    labelled = labels != IGNORED_LABEL
    return F.cross_entropy(decoder.logits(hidden[labelled]).float(), labels[labelled], reduction=reduction)


@dataclass(frozen=True)
class TokenBatch:
    """A batch of examples as the decoder takes them."""

    encoder_hidden_states: Tensor  # [B, P, Hv] float16 or float32
    input_ids: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64

    @property
    def labelled(self) -> int:
        """The number of labelled tokens."""
        return int((self.labels != IGNORED_LABEL).sum())


@dataclass(frozen=True)
class StepReport:
    """The result of a step, or of an evaluation, over all workers."""

    loss: float  # nats per labelled token
    tokens: int  # labelled


class SummedLoss(nn.Module):
    """The sum of a batch's cross-entropy as one forward pass, for DistributedDataParallel to wrap."""

    def __init__(self, decoder: TextDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, encoder_hidden_states: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Returns a scalar, in nats; see `caption_loss` for the arguments."""
        return caption_loss(self.decoder, encoder_hidden_states.float(), input_ids, labels, "sum")


class CrossAttentionTrainer:
    """The trained weights and their optimiser.

    Args:
        decoder: The decoder, on its device and in float32.
        options: Options of the optimiser.
        total_steps: Step at which a linear schedule ends.
        dtype: Precision of the forward pass: `float32`, `bfloat16` or `float16`.
    """

    def __init__(self, decoder: TextDecoder, options: OptimizerConfig, total_steps: int, dtype: str) -> None:
        self.decoder, self.options, self.total_steps = decoder, options, total_steps
        self.trained = freeze_all_but_cross_attention(decoder)
        self.device = self.trained[0].device
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._loss: nn.Module = SummedLoss(decoder)
        if self._world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self._loss = DistributedDataParallel(self._loss, device_ids=devices, broadcast_buffers=False)
        self._optimizer = torch.optim.AdamW(self.trained, lr=options.learning_rate, weight_decay=options.weight_decay)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._dtype == torch.float16)

    def step(self, number: int, batches: Sequence[TokenBatch]) -> StepReport:
        """Trains on one worker's share of a step's examples; all workers must pass the same number of batches.

        Dropout is a function of the seed, the step and the worker, so that a resumed run needs no other state.

        Args:
            number: The step, counted from 0.
            batches: At least one; a worker with nothing left to do passes one without labels.
        """
        self.decoder.train()
        torch.manual_seed(_mix(self.options.seed, number, self._rank))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(number, self.total_steps, self.options)
        tokens = int(self._sum(sum(batch.labelled for batch in batches)))
        summed = 0.0
        for place, batch in enumerate(batches):
            with self._synchronised(place == len(batches) - 1):
                with self._autocast():
                    loss = self._loss(*self._to_device(batch))
                # DistributedDataParallel takes the workers' mean, where the sum is meant.
                self._scaler.scale(loss * (self._world_size / tokens)).backward()
            summed += loss.item()
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self.trained, self.options.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(self._sum(summed) / tokens, tokens)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[TokenBatch]) -> StepReport:
        """Returns the loss without dropout over all workers' batches; there may be none."""
        self.decoder.eval()
        summed, tokens = 0.0, 0
        loss = SummedLoss(self.decoder)
        for batch in batches:
            with self._autocast():
                summed += loss(*self._to_device(batch)).item()
            tokens += batch.labelled
        all_tokens = int(self._sum(tokens))
        return StepReport(self._sum(summed) / all_tokens if all_tokens else math.nan, all_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs besides the trained weights."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._optimizer.load_state_dict(dict(state["optimizer"]))
        self._scaler.load_state_dict(state["scaler"])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    def _synchronised(self, is_last: bool) -> Any:
        """Lets gradients travel between workers only with a step's last batch."""
        wrapped = isinstance(self._loss, DistributedDataParallel) and not is_last
        return self._loss.no_sync() if wrapped else nullcontext()  # type: ignore[operator]

    def _to_device(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states, input_ids, labels = batch.encoder_hidden_states, batch.input_ids, batch.labels
        return hidden_states.to(self.device), input_ids.to(self.device), labels.to(self.device)

    def _sum(self, value: float) -> float:
        """Returns the sum over all workers, in float64."""
        if self._world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)


def learning_rate(step: int, total_steps: int, options: OptimizerConfig) -> float:
    """Returns the learning rate of a step, counted from 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / (options.warmup_steps + 1)
    if options.schedule == "constant":
        return options.learning_rate
    return options.learning_rate * (total_steps - step) / max(1, total_steps - options.warmup_steps)


def _mix(*numbers: int) -> int:
    """Returns a seed that differs wherever one of the numbers does."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest())
