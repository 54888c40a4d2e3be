"""Faults of model actors on a real Ray: each image has one row, with the caption of an undisturbed run.

The actor of these tests does what files in a folder tell it, each once, before it does its work.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from jobs import caption
from jobs.captioning.record import load_run_record
from jobs.cluster.errors import GuardedActor
from smallcap.config import CaptionConfig
from smallcap.errors import RunError
from tests.caption_runs import config_for, rows_of, undisturbed_rows, write_images

pytestmark = pytest.mark.ray

IMAGES = 300  # two fragments
Rows = list[tuple[str, str, str]]


class Plan:
    """Faults that are still to come: a file each, in a folder that all processes see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def add(self, moment: str, kind: str, times: int = 1) -> None:
        for number in range(times):
            (self._folder / f"{moment}.{kind}.{number}").touch()

    def clear(self) -> int:
        """Forgets the faults that are left; returns how many they were."""
        left = list(self._folder.iterdir())
        for file in left:
            file.unlink()
        return len(left)

    def act(self, moment: str) -> None:
        """Takes the next fault of a moment, if there is one, and suffers it."""
        for file in sorted(self._folder.glob(f"{moment}.*")):
            file.unlink()
            suffer(file.name.split(".")[1])
            return


def suffer(kind: str) -> None:
    if kind == "stall":
        threading.Event().wait()
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "cuda":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for it.")
    raise OSError("libcuda.so.1: cannot open shared object file")


def faulty(actor: type[GuardedActor], plan: Plan) -> type[GuardedActor]:
    """Returns an actor that suffers a plan's faults."""

    class Faulty(actor):  # type: ignore[misc, valid-type]
        def load(self, *arguments: Any) -> None:
            plan.act("load")
            super().load(*arguments)

        def process(self, batch: pa.Table) -> pa.Table:
            plan.act("process")
            return super().process(batch)

    return Faulty


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("images"))
    write_images(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def expected(images: str, index: str, tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The rows of an undisturbed run."""
    out = str(tmp_path_factory.mktemp("expected") / "out")
    return undisturbed_rows(config_for(images, index, tiny_smallcap, out))


@pytest.fixture
def config(images: str, index: str, tiny_smallcap: Path, tmp_path: Path) -> CaptionConfig:
    return config_for(images, index, tiny_smallcap, str(tmp_path / "out"), "compute.stall_timeout_s=6")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The faults that the run's actors meet."""
    plan = Plan(tmp_path / "faults")
    map_in_actors = caption.map_in_actors
    monkeypatch.setattr(
        caption, "map_in_actors", lambda data, actor, *others: map_in_actors(data, faulty(actor, plan), *others)
    )
    return plan


def check(config: CaptionConfig, expected: Rows, attempts: int) -> None:
    assert rows_of(config.out) == expected
    record = load_run_record(config.out)
    assert record is not None
    assert (record.status, len(record.attempts), record.images.errors_by_code) == ("complete", attempts, {})


@pytest.mark.slow
def test_a_cuda_error_costs_no_image(config: CaptionConfig, plan: Plan, expected: Rows) -> None:
    plan.add("process", "cuda")
    summary = caption.run(config)
    check(config, expected, attempts=1)
    assert "  Actors started again: 1 (faults: 1 cuda)." in summary.stages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "kind", "counted"),
    [
        ("process", "stall", "1 stall"),
        ("process", "kill", "1 lost"),
        ("load", "cuda", "1 cuda"),
        ("load", "bug", "1 start"),
        ("load", "kill", "1 lost"),
    ],
)
def test_what_ends_an_actor_costs_no_image(
    moment: str, kind: str, counted: str, config: CaptionConfig, plan: Plan, expected: Rows
) -> None:
    plan.add(moment, kind)
    summary = caption.run(config)
    check(config, expected, attempts=1)
    assert f"  Actors started again: 1 (faults: {counted})." in summary.stages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "kind", "found"),
    [
        (
            "process",
            "cuda",
            "AcceleratorError: CUDA error: an illegal memory access was encountered (test_actor_faults.py",
        ),
        ("process", "kill", "The actor's process was killed, or crashed."),
        ("load", "bug", "OSError: libcuda.so.1: cannot open shared object file (test_actor_faults.py"),
        ("load", "kill", "The actor's process was killed, or crashed."),
    ],
)
def test_three_in_a_row_stop_the_run_with_one_message_and_the_same_command_continues(
    moment: str, kind: str, found: str, config: CaptionConfig, plan: Plan, expected: Rows
) -> None:
    plan.add(moment, kind, times=4)
    with pytest.raises(RunError) as caught:
        caption.run(config)
    assert type(caught.value) is RunError
    assert caught.value.what == "An actor failed three times in a row."
    assert caught.value.where.startswith("node ")
    assert caught.value.found.startswith(found)
    assert "before that" not in caught.value.found  # three times the same
    assert plan.clear() == 1
    caption.run(config)
    check(config, expected, attempts=2)
