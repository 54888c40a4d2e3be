"""The paper's claims, measured on the demo world: `demo/claims.json`, and from it the table and the plots.

Test scenes are captioned through `smallcap.Captioner` with indexes that `build-index` made; what differs between rows
is the datastore, k, or the cross-attention. Of the held-out domains cross-attention's training saw nothing, while CLIP
and GPT-2 did, as models of web data would have.

Needs the font, and for the sections that train what `make demo-model` left in its work folder. Rows that are there
already are kept; `--force` measures all of them again.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from demo.claim_datastores import build_datastores
from demo.claim_report import write_report
from demo.claim_rows import RandomCaptions, Row, Scenes, measure
from demo.data import render_pool
from demo.datastore import datastore_rows
from demo.make import DEMO, run_step
from demo.train_cross_attention import CrossAttentionRecipe, train_cross_attention
from demo.world import OTHER, OTHER_TEST, TEST, TRAINING
from smallcap.captioner import Captioner
from smallcap.index.retriever import Retriever
from smallcap.model.checkpoint import load_checkpoint
from smallcap.training.objective import freeze_all_but_cross_attention

KS = range(1, 8)
REDUCE_FACTORS = (1, 2, 4, 8, 16)
SHORT = {"scenes": 8_000, "steps": 240}  # of the trainings that are compared with each other
MODES = ("top-k", "sample-k")


class Claims:
    """The measured rows, kept in a file as they come."""

    def __init__(self, file: Path, scenes: int) -> None:
        self.file = file
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.values: dict[str, Any] = found if found.get("scenes") == scenes else {"scenes": scenes}

    def row(self, path: str, make: Callable[[], Row]) -> None:
        """Measures the row at a path of sections and a name, unless it is there."""
        *sections, name = path.split("/")
        values = self.values
        for section in sections:
            values = values.setdefault(section, {})
        if name in values:
            return
        start = time.perf_counter()
        values[name] = make().as_json()
        self.file.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        seconds = time.perf_counter() - start
        print(
            f"{path}: CIDEr {values[name]['cider']:.2f}, right {values[name]['accuracy']:.1%}, {seconds:.0f} s",
            flush=True,
        )


class Experiments:
    """All sections of the claims."""

    def __init__(self, work: Path, claims: Claims, scenes: int) -> None:
        self.work, self.claims = work, claims
        self.in_domain, self.transfer = Scenes.render(TEST, scenes), Scenes.render(OTHER_TEST, scenes)
        self.indexes = build_datastores(work / "datastores")

    def caption(self, scenes: Scenes, datastore: str | None, k: int | None = None, model: str = "demo") -> Row:
        """Measures a model with a datastore; None captions without retrieval."""
        index = self.indexes[datastore] if datastore else None
        return measure(Captioner.from_pretrained(model, index, k=k if index else 0), scenes)

    def caption_with_random(self, scenes: Scenes, model: str = "demo") -> Row:
        """Measures a model that is prompted with captions of the scenes' own domains, whatever the image."""
        name, source = ("training", TRAINING) if scenes is self.in_domain else ("other", OTHER)
        texts = [caption for _, caption in datastore_rows(source)]
        retriever = RandomCaptions(Retriever.open(self.indexes[name]), texts)
        return measure(Captioner.from_pretrained(model, retriever), scenes)

    def datastores(self) -> None:
        """The swap: the same model and images, another datastore."""
        row, caption = self.claims.row, self.caption
        for name, scenes, own in (("in_domain", self.in_domain, "training"), ("transfer", self.transfer, "other")):
            row(f"{name}/none", lambda scenes=scenes: caption(scenes, None, model=self._without_retrieval()))
            row(f"{name}/random", lambda scenes=scenes: self.caption_with_random(scenes))
            row(f"{name}/own_datastore", lambda scenes=scenes, own=own: caption(scenes, own))
            row(f"{name}/both", lambda scenes=scenes: caption(scenes, "both"))
            row(f"{name}/everything_and_noise", lambda scenes=scenes: caption(scenes, "everything"))
        row("in_domain/other_datastore", lambda: caption(self.in_domain, "other"))
        row("transfer/training_datastore", lambda: caption(self.transfer, "training"))
        for share in ("eighth", "half"):
            row(f"transfer/own_datastore_{share}", lambda share=share: caption(self.transfer, f"other-{share}"))

    def numbers_of_captions(self) -> None:
        """k from 1 to 7, with the model that was trained with four."""
        for k in KS:
            self.claims.row(f"k/{k}/in_domain", lambda k=k: self.caption(self.in_domain, "training", k))
            self.claims.row(f"k/{k}/transfer", lambda k=k: self.caption(self.transfer, "other", k))

    def sizes(self) -> None:
        """Cross-attention of several widths, trained alike and shortly."""
        for factor in REDUCE_FACTORS:
            folder = self._trained(f"reduce-{factor}", CrossAttentionRecipe(reduce_factor=factor, **SHORT))
            self.claims.row(
                f"reduce_factor/{factor}/in_domain", lambda f=folder: self.caption(self.in_domain, "training", model=f)
            )
            self.claims.row(
                f"reduce_factor/{factor}/transfer", lambda f=folder: self.caption(self.transfer, "other", model=f)
            )
            trained = freeze_all_but_cross_attention(load_checkpoint(folder).decoder)
            self.claims.values["reduce_factor"][str(factor)]["trained_parameters"] = sum(p.numel() for p in trained)

    def sampling(self) -> None:
        """Training with the nearest captions against training with drawn ones."""
        for mode in MODES:
            name = "reduce-1" if mode == "top-k" else mode
            folder = self._trained(name, CrossAttentionRecipe(retrieval=mode, **SHORT))
            rows: dict[str, Callable[[], Row]] = {
                "in_domain": lambda f=folder: self.caption(self.in_domain, "training", model=f),
                "in_domain_random": lambda f=folder: self.caption_with_random(self.in_domain, f),
                "transfer": lambda f=folder: self.caption(self.transfer, "other", model=f),
                "transfer_noisy": lambda f=folder: self.caption(self.transfer, "noisy", model=f),
                "transfer_random": lambda f=folder: self.caption_with_random(self.transfer, f),
            }
            for name, make in rows.items():
                self.claims.row(f"retrieval/{mode}/{name}", make)

    def _without_retrieval(self) -> str:
        """Trains without retrieval on as many examples as the shipped model saw."""
        recipe = CrossAttentionRecipe()
        plain_steps = recipe.steps * recipe.batch_size // recipe.plain_batch_size
        return self._trained("no-retrieval", replace(recipe, steps=0, plain_steps=plain_steps))

    def _trained(self, name: str, recipe: CrossAttentionRecipe) -> str:
        """Trains a cross-attention below the work folder, unless it is there."""
        clip, language_model = self.work / "clip", self.work / "language-model"

        def train(folder: Path) -> None:
            if not language_model.exists():
                raise SystemExit(f"{language_model} is not there: run `make demo-model` first")
            images = render_pool(TRAINING, CrossAttentionRecipe.scenes, self.work)
            train_cross_attention(recipe, clip, language_model, images, folder)

        out = self.work / "claims" / name
        run_step(name, out, train)
        return str(out)


def main() -> None:
    """Measures the paper's claims on the demo world, and writes demo/claims.json, the table and the plots."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("out/demo-model"))
    parser.add_argument("--scenes", type=int, default=1_000, help="of the training domains, and as many of the others")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for claims.json, README.md and the plots")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="measure and train all again")
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
