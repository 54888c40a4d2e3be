"""Owns what trials work on: inputs, and the results of jobs that nothing disturbs; made once, in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.tiny_models import make_tiny_clip, make_tiny_smallcap
from index_builder.work.staging import STAGING_PREFIX
from smallcap import storage
from smallcap.errors import SmallCapError
from smallcap.index.manifest import load_manifest
from smallcap.output.part_files import read_part_infos
from tests.caption_runs import config_for, read_rows, rows_of, undisturbed_rows, write_images
from tests.index_files import build_text_index
from tests.train_runs import write_captioned_images

IMAGES = 1_536  # six fragments
CAPTIONS = 6_000
TRAIN_IMAGES, EPOCHS, BATCH_SIZE = 48, 8, 8
STEPS = 2 * TRAIN_IMAGES * EPOCHS // BATCH_SIZE  # two captions an image
BUILD_STAGES = 6
_SETS = ("output.rows_per_part=32", "compute.batch_size=8", "compute.dtype=float32")
_SMALLCAP = [sys.executable, "-m", "jobs.cli"]


@dataclass(frozen=True)
class Verdict:
    """What became of a job's work, compared with an undisturbed job's."""

    lost: int
    twice: int
    changed: int

    @property
    def is_right(self) -> bool:
        """Whether nothing is lost, twice, or other than it should be."""
        return not (self.lost or self.twice or self.changed)


class Work(ABC):
    """A job on the world's inputs: its command, how far it is, and what became of it."""

    inputs: tuple[str, ...] = ()  # folders of the world that the bucket has

    def __init__(self, world: Path) -> None:
        self.world = world

    @abstractmethod
    def command(self, place: str, out: str) -> list[str]:
        """Returns the command; `place` is the prefix with the inputs, or the world's folder."""

    @abstractmethod
    def progress(self, out: str) -> float:
        """Returns the share of the work that is done, from 0 to 1."""

    @abstractmethod
    def judge(self, out: str) -> Verdict:
        """Compares the output with an undisturbed one."""

    @abstractmethod
    def make(self) -> None:
        """Makes the inputs and the undisturbed output."""


class Caption(Work):
    """Captions images. The model stays on disk, which all nodes of a trial share; images and the index are fetched."""

    inputs = ("images", "index")

    def command(self, place: str, out: str) -> list[str]:
        model = ["--model", str(self.world / "smallcap"), "--index", f"{place}/index"]
        sets = [argument for one in _SETS for argument in ("--set", one)]
        return [*_SMALLCAP, "caption", f"{place}/images", *model, "--out", out, *sets]

    def progress(self, out: str) -> float:
        return sum(len(rows) for _, info in read_part_infos(out) if info for rows in info.rows.values()) / IMAGES

    def judge(self, out: str) -> Verdict:
        found = Counter(tuple(row) for row in rows_of(out))
        ids = Counter(row[0] for row in found.elements())
        expected = {tuple(row) for row in json.loads((self.world / "rows.json").read_text())}
        lost = len({row[0] for row in expected} - set(ids))
        return Verdict(lost, sum(count - 1 for count in ids.values()), len(set(found) - expected))

    def errors(self, out: str) -> list[str]:
        """Returns the codes of rows that are errors, which `--retry-failed` would try again."""
        return sorted(set(read_rows(out).error_code.dropna()))

    def make(self) -> None:
        images, model = str(self.world / "images"), self.world / "smallcap"
        make_tiny_smallcap(model, self.world / "clip")
        write_images(images, IMAGES)
        nouns = [(noun, place) for noun in ("dog", "bus") for place in ("sea", "road")]
        rows = (f"{n}.jpg,{n} {noun} on the {place}" for n in range(8) for noun, place in nouns)
        index = build_text_index(self.world, self.world / "clip", rows)
        expected = undisturbed_rows(config_for(images, index, model, str(self.world / "rows"), *_SETS))
        (self.world / "rows.json").write_text(json.dumps(expected))


class Build(Work):
    """Builds an index of four shards."""

    inputs = ("dumps",)

    def command(self, place: str, out: str) -> list[str]:
        encoder = ["--encoder", f"hf:{self.world / 'clip'}", "--index-key", "IVF16,SQ8", "--shards", "4"]
        sets = ["--set", "cleaning.tokenizer=null", "--set", "recall.target=0.1", "--set", "recall.queries=64"]
        dumps = [f"{place}/dumps/{number}.csv" for number in range(2)]
        return [*_SMALLCAP, "build-index", *dumps, "--out", out, *encoder, *sets]

    def progress(self, out: str) -> float:
        staging = [uri for uri in storage.list_folder(out) if STAGING_PREFIX in uri]
        begun = (len(storage.list_folder(storage.join(uri, "results"))) for uri in staging)
        return max(begun, default=0) / BUILD_STAGES

    def judge(self, out: str) -> Verdict:
        expected = load_manifest(str(self.world / "built"))
        try:
            found = load_manifest(out)
        except SmallCapError:
            return Verdict(expected.ntotal, 0, 0)
        changed = sum(not self._is_as_expected(out, entry.file) for entry in expected.files)
        changed += found.index_id != expected.index_id
        return Verdict(max(0, expected.ntotal - found.ntotal), max(0, found.ntotal - expected.ntotal), changed)

    def _is_as_expected(self, out: str, name: str) -> bool:
        uri = storage.join(out, name)
        return storage.exists(uri) and storage.read_bytes(uri) == (self.world / "built" / name).read_bytes()

    def make(self) -> None:
        (self.world / "dumps").mkdir()
        for number in range(2):
            rows = (f"image{row // 2},a picture of thing {row} of dump {number}" for row in range(CAPTIONS // 2))
            (self.world / "dumps" / f"{number}.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
        _run_undisturbed(self.command(str(self.world), str(self.world / "built")))


class Train(Work):
    """Trains a model on stored features."""

    inputs = ("captioned", "index")

    def command(self, place: str, out: str) -> list[str]:
        model = ["--model", str(self.world / "smallcap"), "--index", f"{place}/index", "--dtype", "float32"]
        options = ["--epochs", str(EPOCHS), "--batch-size", str(BATCH_SIZE), "--set", "checkpoint_steps=4"]
        return [*_SMALLCAP, "train", f"{place}/captioned/captions.csv", *model, *options, "--out", out]

    def progress(self, out: str) -> float:
        done = storage.list_files(storage.join(out, "checkpoints"), ("checkpoint.json",))
        return max((int(uri.rsplit("/", 2)[-2].removeprefix("step-")) for uri in done), default=0) / STEPS

    def judge(self, out: str) -> Verdict:
        log, weights = self._results(out)
        expected_log, expected_weights = self._expected
        lost, twice = len(set(expected_log) - set(log)), len(log) - len(set(log))
        return Verdict(lost, twice, (log != expected_log) + (weights != expected_weights))

    @cached_property
    def _expected(self) -> tuple[list[tuple[int, float]], bytes]:
        return self._results(str(self.world / "trained"))

    def _results(self, out: str) -> tuple[list[tuple[int, float]], bytes]:
        lines = storage.read_bytes(storage.join(out, "train_log.jsonl")).decode().splitlines()
        losses = [(line["step"], line["loss"]) for line in map(json.loads, lines)]
        return losses, storage.read_bytes(storage.join(out, "model", "model.safetensors"))

    def make(self) -> None:
        write_captioned_images(self.world / "captioned", TRAIN_IMAGES)
        _run_undisturbed(self.command(str(self.world), str(self.world / "trained")))


WORK: dict[str, type[Work]] = {"caption": Caption, "build": Build, "train": Train}


def make_world(folder: Path) -> None:
    """Makes the inputs of all jobs and their undisturbed outputs; does nothing when they are there."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_clip(folder / "clip", seed=0)
    for work in WORK.values():
        work(folder).make()
    (folder / "complete").touch()


def put_inputs(work: Work, place: str) -> None:
    """Copies a job's inputs from the world to a prefix."""
    for name in work.inputs:
        for path in sorted((work.world / name).rglob("*")):
            if path.is_file():
                storage.upload(path, storage.join(place, str(path.relative_to(work.world))))


def _run_undisturbed(command: list[str]) -> None:
    subprocess.run([*command, "-q"], check=True)
