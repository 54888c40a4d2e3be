"""Schedules of `make chaos` are the same for the same seed; and those of nodes, heads and drivers come out right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.__main__ import SEEDS, parse_seeds
from tests.chaos.disturbances import KINDS
from tests.chaos.schedule import TURNS, draw
from tests.chaos.world import make_world


def test_a_seed_stands_for_one_schedule_and_every_kind_has_its_turn() -> None:
    schedules = [draw(seed) for seed in range(TURNS)]
    assert schedules == [draw(seed) for seed in range(TURNS)]
    assert draw(2) != draw(2 + TURNS)
    assert draw(2).job == draw(2 + TURNS).job
    usual = [draw(seed) for seed in parse_seeds(SEEDS)]
    assert len(usual) >= 25
    assert {disturbance.kind for one in usual for disturbance in one.disturbances} == set(KINDS)
    assert {one.job for one in usual} == {"caption", "build", "train"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("chaos") / "world"
    make_world(world)
    return world


@pytest.mark.own_ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, id=str(draw(seed)))
        for seed in range(TURNS)
        if {one.kind.split()[0] for one in draw(seed).disturbances} <= {"node", "head", "driver"}
    ],
)
def test_nodes_heads_and_drivers_die(seed: int, world: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--seeds", str(seed), "--world", str(world)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
