"""Backward passes on the pretended device, node by node: torch's own engine would start a thread for a real GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def run_backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Adds to every leaf's `grad` what the outputs depend on it; hooks are not called."""
    roots = [output.grad_fn for output in outputs]
    waiting = _count_users(roots)
    received: dict[Any, dict[int, Tensor]] = {}
    for root, output, gradient in zip(roots, outputs, gradients, strict=True):
        _receive(received, root, output.output_nr, gradient)
    ready = [root for root in dict.fromkeys(roots) if not waiting[root]]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            for (user, place), gradient in zip(node.next_functions, _call(node, received.pop(node, {})), strict=False):
                if user is None:
                    continue
                if gradient is not None:
                    _receive(received, user, place, gradient)
                waiting[user] -= 1
                if not waiting[user]:
                    ready.append(user)


def _count_users(roots: Sequence[Any]) -> Counter[Any]:
    """Returns how many gradients each node of the graph waits for."""
    waiting: Counter[Any] = Counter()
    seen, stack = set(roots), list(roots)
    while stack:
        for user, _ in stack.pop().next_functions:
            if user is None:
                continue
            waiting[user] += 1
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return waiting


def _receive(received: dict[Any, dict[int, Tensor]], node: Any, place: int, gradient: Tensor) -> None:
    expected = node._input_metadata[place]
    gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)  # of what was broadcast, and cast
    of_node = received.setdefault(node, {})
    of_node[place] = of_node[place] + gradient if place in of_node else gradient


def _call(node: Any, received: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Returns the gradients of a node's inputs."""
    if not received:
        return [None] * len(node.next_functions)
    given = [received.get(place) for place in range(len(node._input_metadata))]
    found = node(*given)
    return found if isinstance(found, tuple) else (found,)
