"""What tests on the pretended device share: faults put into the code on purpose, and budgets of waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from tests.pretended_cuda.device import Event, PretendedCuda
from tests.pretended_cuda.torch_cuda import pretended_cuda

Mutation = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def mutated(mutation: Mutation | None, cards: int = 1) -> Iterator[PretendedCuda]:
    """A pretended device with a fault in the code that runs on it, or without one."""
    with pretended_cuda(cards=cards) as cuda, pytest.MonkeyPatch.context() as monkeypatch:
        if mutation is not None:
            mutation(monkeypatch)
        yield cuda


def check_waits(
    cuda: PretendedCuda, budget: Mapping[str, tuple[int, str]], batches: int, place_of: Callable[[Event], str]
) -> None:
    """The host waits in no place more often than is reasoned.

    Args:
        cuda: The device that has worked on some batches.
        budget: How often the host may wait in a place while one batch is worked on, and why it must.
        batches: How many there were.
        place_of: Names an event's place, as the budget does.
    """
    waits = list(cuda.waits().elements())
    assert waits
    for place, count in Counter(map(place_of, waits)).items():
        limit, reason = budget.get(place, (0, "nothing there needs one"))
        lines = sorted({str(event) for event in waits if place_of(event) == place})
        assert count <= limit * batches, f"{count} waits in {batches} batches, not {limit} each: {reason}; {lines}"
