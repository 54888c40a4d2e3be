"""Measures the paper's claims on the demo world, and writes `demo/claims.json`, the tables and the plots.

`smallcap.Captioner` captions test scenes with indexes that `build-index` made. Rows differ in the datastore, in k, or
in the cross-attention. CLIP and GPT-2 saw the held-out domains in training, as models of web data would have;
cross-attention did not.

This needs the font, and the sections that train need the work folder of `make demo-model`. Rows that were measured
before are kept; `--force` measures all rows again.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from demo.claim_datastores import build_datastores
from demo.claim_report import write_report
from demo.claim_rows import RandomCaptions, Row, score
from demo.datastore import datastore_rows
from demo.drawn_scenes import DrawnScenes
from demo.make import DEMO, run_step
from demo.train_cross_attention import SHORT_SCENES, train_cross_attention, training_config
from demo.world import OTHER, OTHER_TEST, TEST, TRAINING
from smallcap.captioner import Captioner
from smallcap.index.retriever import Retriever
from smallcap.model.checkpoint import load_checkpoint
from smallcap.model.files import DEMO as DEMO_MODEL
from smallcap.training.objective import freeze_all_but_cross_attention
from smallcap.training.retrieval_sampling import RetrievalMode

KS = range(1, 8)
REDUCE_FACTORS = (1, 2, 4, 8, 16)
SHORT = {"scenes": SHORT_SCENES, "epochs": 1}
MODES: tuple[RetrievalMode, ...] = ("top-k", "sample-k")


class Claims:
    """The measured rows; each is stored as soon as it is measured."""

    def __init__(self, file: Path, scenes: int) -> None:
        self.file = file
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.values: dict[str, Any] = stored if stored.get("scenes") == scenes else {"scenes": scenes}

    def row(self, path: str, measure: Callable[..., Row], *arguments: Any, **options: Any) -> None:
        """Measures the row at `section/…/name`, unless it has been measured."""
        *sections, name = path.split("/")
        values = self.values
        for section in sections:
            values = values.setdefault(section, {})
        if name in values:
            return
        start = time.perf_counter()
        row = measure(*arguments, **options)
        values[name] = row.as_json()
        self.file.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        seconds = time.perf_counter() - start
        print(f"{path}: CIDEr {row.cider:.2f}, right {row.accuracy:.1%}, {seconds:.0f} s", flush=True)


class Experiments:
    """All sections of the claims."""

    def __init__(self, work: Path, claims: Claims, scenes: int) -> None:
        self.work, self.claims = work, claims
        self.in_domain, self.transfer = DrawnScenes.render(TEST, scenes), DrawnScenes.render(OTHER_TEST, scenes)
        self.indexes = build_datastores(work / "datastores")

    def caption(self, scenes: DrawnScenes, datastore: str, k: int | None = None, model: str = DEMO_MODEL) -> Row:
        """Measures a model with a datastore."""
        return score(scenes.caption(Captioner.from_pretrained(model, self.indexes[datastore], k=k)), scenes)

    def caption_with_random(self, scenes: DrawnScenes, model: str = DEMO_MODEL) -> Row:
        """Measures a model that is prompted with captions of the scenes' own domains, whatever the image."""
        name, source = ("training", TRAINING) if scenes is self.in_domain else ("other", OTHER)
        texts = [caption for _, caption in datastore_rows(source)]
        retriever = RandomCaptions(Retriever.open(self.indexes[name]), texts)
        return score(scenes.caption(Captioner.from_pretrained(model, retriever)), scenes)

    def caption_without_retrieval(self, scenes: DrawnScenes) -> Row:
        """Measures a model trained without retrieval, for one of the shipped one's two epochs."""
        model = self._trained("no-retrieval", retrieval=None, epochs=1)
        return score(scenes.caption(Captioner.from_pretrained(model, k=0)), scenes)

    def datastores(self) -> None:
        """Swaps the datastore; model and images stay the same."""
        row = self.claims.row
        sides = (("in_domain", self.in_domain, "training"), ("transfer", self.transfer, "other"))
        for name, scenes, own_datastore in sides:
            row(f"{name}/own_datastore", self.caption, scenes, own_datastore)
            row(f"{name}/random", self.caption_with_random, scenes)
            row(f"{name}/both", self.caption, scenes, "both")
            row(f"{name}/everything_and_noise", self.caption, scenes, "everything")
        row("in_domain/other_datastore", self.caption, self.in_domain, "other")
        row("transfer/training_datastore", self.caption, self.transfer, "training")
        for share in ("eighth", "half"):
            row(f"transfer/own_datastore_{share}", self.caption, self.transfer, f"other-{share}")
        for name, scenes, _ in sides:
            row(f"{name}/none", self.caption_without_retrieval, scenes)

    def numbers_of_captions(self) -> None:
        """Varies k from 1 to 7; the model was trained with four."""
        for k in KS:
            self._own_datastores(f"k/{k}", k=k)

    def sizes(self) -> None:
        """Compares cross-attentions of several widths after the same short training."""
        for factor in REDUCE_FACTORS:
            model = self._trained(f"reduce-{factor}", reduce_factor=factor, **SHORT)
            self._own_datastores(f"reduce_factor/{factor}", model=model)
            trained = freeze_all_but_cross_attention(load_checkpoint(model).decoder)
            self.claims.values["reduce_factor"][str(factor)]["trained_parameters"] = sum(p.numel() for p in trained)

    def sampling(self) -> None:
        """Compares training with the nearest captions and training with drawn ones."""
        for mode in MODES:
            name = "reduce-1" if mode == "top-k" else mode
            model, section = self._trained(name, retrieval=mode, **SHORT), f"retrieval/{mode}"
            self._own_datastores(section, model=model)
            self.claims.row(f"{section}/in_domain_random", self.caption_with_random, self.in_domain, model)
            self.claims.row(f"{section}/transfer_noisy", self.caption, self.transfer, "noisy", model=model)
            self.claims.row(f"{section}/transfer_random", self.caption_with_random, self.transfer, model)

    def _own_datastores(self, section: str, **options: Any) -> None:
        self.claims.row(f"{section}/in_domain", self.caption, self.in_domain, "training", **options)
        self.claims.row(f"{section}/transfer", self.caption, self.transfer, "other", **options)

    def _trained(self, name: str, **options: Any) -> str:
        """Returns the folder of a cross-attention; if it is missing, it is trained below the work folder."""
        out = self.work / "claims" / name
        config = training_config(self.work, self.work / "claims" / f"{name}.run", self.indexes["training"], **options)

        def train(folder: Path) -> None:
            if not (self.work / "training-scenes").exists():
                raise SystemExit(f"{self.work}/training-scenes does not exist: run `make demo-model` first.")
            train_cross_attention(config, folder)

        run_step(name, out, train)
        return str(out)


def main() -> None:
    """Measures the paper's claims on the demo world, and writes demo/claims.json, the tables and the plots."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("out/demo-model"))
    parser.add_argument(
        "--scenes",
        type=int,
        default=1_000,
        help="number of test scenes of the training domains, and of the held-out ones",
    )
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for claims.json, README.md and the plots")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="measure and train everything again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measured = arguments.work_dir / "claims.json"
    if arguments.force:
        measured.unlink(missing_ok=True)
        shutil.rmtree(arguments.work_dir / "claims", ignore_errors=True)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    experiments = Experiments(arguments.work_dir, Claims(measured, arguments.scenes), arguments.scenes)
    for section in (experiments.datastores, experiments.numbers_of_captions, experiments.sizes, experiments.sampling):
        section()
    write_report(experiments.claims.values, arguments.out)


if __name__ == "__main__":
    main()
