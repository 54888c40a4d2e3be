"""Actors of one card, whose memory is a number here: each finds the room of its share, whatever the others do."""

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

from smallcap.errors import ConfigError
from smallcap.machine.gpu_memory import limit_to_share, room_bytes, set_aside

GB = 1 << 30
TOTAL = 24 * GB
CONTEXT = GB // 2  # what a process has on the card beside its tensors
DEVICE = torch.device("cuda:0")


class Card:
    """A card's memory and the processes on it; `work_in` makes torch.cuda that of one process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.processes: dict[str, SimpleNamespace] = {}

    @property
    def free(self) -> int:
        return TOTAL - sum(process.reserved + CONTEXT for process in self.processes.values())

    def work_in(self, name: str) -> SimpleNamespace:
        process = self.processes.setdefault(name, SimpleNamespace(allocated=0, reserved=0, limit=1.0))
        for name_in_torch, stand_in in {
            "mem_get_info": lambda device=None: (self.free, TOTAL),
            "memory_allocated": lambda device=None: process.allocated,
            "memory_reserved": lambda device=None: process.reserved,
            "get_per_process_memory_fraction": lambda device=None: process.limit,
            "set_per_process_memory_fraction": lambda fraction, device=None: setattr(process, "limit", fraction),
        }.items():
            self._monkeypatch.setattr(torch.cuda, name_in_torch, stand_in)
        return process


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def test_an_actor_with_a_card_of_its_own_has_what_is_free(card: Card) -> None:
    process = card.work_in("only")
    limit_to_share(1.0)
    process.reserved = 3 * GB
    assert room_bytes(DEVICE) == TOTAL - CONTEXT - 3 * GB


def test_the_room_of_actors_of_one_card_does_not_depend_on_their_order(card: Card) -> None:
    rooms = set()
    for order in permutations(("a", "b", "c", "d")):
        card.processes.clear()
        for name in order:
            process = card.work_in(name)
            limit_to_share(0.25)
            process.allocated, process.reserved = 2 * GB, 3 * GB  # the model, and what loading it left behind
            rooms.add(room_bytes(DEVICE))
            process.reserved = int(process.limit * TOTAL)  # and now it captions, with all that it may take
        assert card.free >= 0
    assert rooms == {6 * GB - (768 << 20) - 2 * GB}


def test_what_others_have_taken_without_a_share_is_not_there(card: Card) -> None:
    card.work_in("of another user").reserved = 22 * GB
    card.work_in("actor")
    limit_to_share(0.5)
    assert room_bytes(DEVICE) == GB


def test_what_another_library_takes_counts_against_the_share(card: Card) -> None:
    card.work_in("actor")
    limit_to_share(0.5)
    set_aside(4 * GB, DEVICE)
    assert room_bytes(DEVICE) == pytest.approx(8 * GB - (768 << 20), abs=8)
    set_aside(TOTAL, DEVICE)
    assert room_bytes(DEVICE) == 0
    alone = card.work_in("alone")
    set_aside(4 * GB, DEVICE)
    assert alone.limit == 1  # the card says itself what is free


def test_a_share_that_holds_no_model_is_refused(card: Card) -> None:
    card.work_in("actor")
    with pytest.raises(ConfigError, match=r"compute\.gpus_per_actor(.|\n)*more than 0\.03"):
        limit_to_share(0.03)
