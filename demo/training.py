"""Trains each of the demo's models: the fields that recipes share, the loop, and batches of texts of similar length."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

BATCHES_DRAWN = 16  # drawn together and sorted by length
STEPS_PER_LINE = 100
LOWEST = 0.01  # the last step's learning rate, as a share of the recipe's

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
    losses: Callable[[int], Iterable[tuple[Tensor, Mapping[str, float]]]],
    checkpoint: Path,
) -> None:
    """Trains parameters by AdamW with warm-up and cosine; prints means of all figures every STEPS_PER_LINE steps.

    A checkpoint is written with each line. An attempt with the same recipe goes on from there.

    Args:
        name: The model's name in the printed lines.
        parameters: The parameters to train.
        recipe: The learning rate, its warm-up, the weight decay and the number of steps.
        losses: Returns the losses from a step on, counted from 0: each computed when it is asked for, with figures to
            print.
        checkpoint: The checkpoint's file, which is removed at the end.
    """
    steps = recipe.steps
    trained = list(parameters)
    groups = [
        {
            "params": [parameter for parameter in trained if (parameter.ndim < 2) == vectors],
            "weight_decay": 0.0 if vectors else recipe.weight_decay,
        }
        for vectors in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        progress = min(1.0, step / steps)
        cosine = LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * progress))
        return min(1.0, (step + 1) / recipe.warmup_steps) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    first = _resume(checkpoint, recipe, trained, optimizer, schedule)
    sums, start = defaultdict[str, float](float), time.perf_counter()
    for step, (loss, figures) in enumerate(losses(first), start=first + 1):
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
            state = {"recipe": asdict(recipe), "step": step, "trained": trained}
            states = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state | states, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").rename(checkpoint)
    checkpoint.unlink(missing_ok=True)


@torch.no_grad()
def _resume(
    checkpoint: Path,
    recipe: Recipe,
    trained: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Restores a checkpoint of the same recipe; returns the number of steps done, which is 0 without one."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    if state["recipe"] != asdict(recipe):
        return 0
    for parameter, stored in zip(trained, state["trained"], strict=True):
        parameter.copy_(stored)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


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
