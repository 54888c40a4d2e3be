"""Trains each of the demo's models: the fields that recipes share, the loop, and batches of texts of similar length."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from smallcap.machine.precision import resolve_dtype

BATCHES_DRAWN = 16  # drawn together and sorted by length
STEPS_PER_LINE = 100

Item = TypeVar("Item")


@dataclass(frozen=True)
class Recipe:
    """The settings that decide the result of a training."""

    scenes: int = 24_000
    captions_per_scene: int = 4
    steps: int = 2_000
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0


def descend(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    recipe: Recipe,
    losses: Iterable[tuple[Tensor, Mapping[str, float]]],
    lowest: float = 0.01,
    steps: int | None = None,
    vectors_decay: bool = False,
) -> None:
    """Trains parameters by AdamW with warm-up and cosine; prints means of all figures every STEPS_PER_LINE steps.

    Args:
        name: The model's name in the printed lines.
        parameters: The parameters to train.
        recipe: The learning rate, its warm-up, the weight decay and the number of steps.
        losses: Each step's loss, computed when it is asked for, with figures to print.
        lowest: The last step's learning rate, as a share of the recipe's.
        steps: The number of losses; by default the recipe's.
        vectors_decay: Whether biases and other vectors decay as matrices do.
    """
    steps = steps or recipe.steps
    trained = list(parameters)
    groups = [
        {
            "params": [parameter for parameter in trained if (parameter.ndim < 2) == vectors],
            "weight_decay": recipe.weight_decay if vectors_decay or not vectors else 0.0,
        }
        for vectors in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        progress = min(1.0, step / steps)
        cosine = lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
        return min(1.0, (step + 1) / recipe.warmup_steps) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    sums, start = defaultdict[str, float](float), time.perf_counter()
    for step, (loss, figures) in enumerate(losses, start=1):
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        for figure, value in {"loss": loss.item(), **figures}.items():
            sums[figure] += value
        if step % STEPS_PER_LINE == 0 or step == steps:
            count = (step - 1) % STEPS_PER_LINE + 1
            means = ", ".join(f"{figure} {total / count:.3f}" for figure, total in sums.items())
            print(f"{name} step {step}: {means}, {time.perf_counter() - start:.0f} s", flush=True)
            sums.clear()


def fast_matrices() -> torch.autocast:
    """Returns the context for a forward pass in training: bfloat16 if this CPU is faster in it, else float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=resolve_dtype("auto", "cpu") == "bfloat16")


def batches_of_like_length(
    draw: Callable[[int], Iterable[Item]],
    length: Callable[[Item], int],
    steps: int,
    batch_size: int,
    rng: random.Random,
) -> Iterator[list[Item]]:
    """Yields one batch per step; items of several steps are drawn together and sorted by length, which saves padding.

    Args:
        draw: Returns the requested number of items.
        length: Returns the length of an item.
        steps: The number of batches.
        batch_size: Items in each batch.
        rng: Shuffles the batches that were drawn together.
    """
    batches: list[list[Item]] = []
    for _ in range(steps):
        if not batches:
            drawn = sorted(draw(BATCHES_DRAWN * batch_size), key=length)
            batches = [drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)]
            rng.shuffle(batches)
        yield batches.pop()
