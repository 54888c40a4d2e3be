"""Makes the demo again from scratch: images, CLIP, GPT-2, cross-attention, caption dumps, and the measurement.

Each step writes below the work folder. It is skipped when its output exists; `--force` repeats all steps.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from demo.data import render_pool
from demo.datastore import write_shipped
from demo.evaluate import evaluate
from demo.tokenizer import clip_form, save_gpt2_tokenizer, train_tokenizer
from demo.train_clip import ClipRecipe, save_clip, train_clip
from demo.train_cross_attention import train_cross_attention, training_config, write_training_scenes
from demo.train_language_model import train_language_model
from demo.training import Recipe
from demo.world import WEB
from jobs.demo import build_demo_index
from smallcap.captioner import Captioner

DEMO = Path(__file__).parent


def run_step(name: str, output: Path, make: Callable[[Path], None]) -> None:
    """Makes `output` under a temporary name and renames it when it is complete; does nothing if it exists."""
    if output.exists():
        print(f"{name}: {output} exists, skipped", flush=True)
        return
    start = time.perf_counter()
    unfinished = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    unfinished.rename(output)
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def make_frozen_models(work: Path) -> None:
    """Trains CLIP and GPT-2 below `work`."""
    clip, tokenizer = ClipRecipe(), train_tokenizer()

    def make_clip(folder: Path) -> None:
        wrapped = clip_form(tokenizer)
        images = render_pool(WEB, clip.scenes, work)
        save_clip(train_clip(clip, images, wrapped, work / "clip.checkpoint"), wrapped, folder)

    def make_language_model(folder: Path) -> None:
        train_language_model(Recipe(), tokenizer, work / "language-model.checkpoint").save_pretrained(folder)
        save_gpt2_tokenizer(tokenizer, folder)

    run_step("clip", work / "clip", make_clip)
    run_step("language model", work / "language-model", make_language_model)


def make_smallcap(work: Path) -> None:
    """Trains cross-attention below `work`, between the GPT-2 there and the CLIP in `demo/`, on the dump in `demo/`."""
    run_step("training scenes", work / "training-scenes", write_training_scenes)
    config = training_config(work, work / "training", str(work / "index"))

    def make(folder: Path) -> None:
        build_demo_index(str(work / "index"))
        train_cross_attention(config, folder)

    run_step("cross-attention", work / "smallcap", make)


def publish(model: Path) -> None:
    """Puts a model's folder into `demo/model/`."""
    target = DEMO / "model" / model.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(model, target)


def main() -> None:
    """Makes the demo's model and data again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("out/demo-model"))
    parser.add_argument("--force", action="store_true", help="repeat every step, rendering included")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.force:
        shutil.rmtree(arguments.work_dir, ignore_errors=True)
    make_frozen_models(arguments.work_dir)
    publish(arguments.work_dir / "clip")
    write_shipped(DEMO)
    make_smallcap(arguments.work_dir)
    publish(arguments.work_dir / "smallcap")
    index = build_demo_index("out/demo/index").index_uri
    evaluate(Captioner.from_pretrained("demo", index), 600, arguments.work_dir / "evaluation.json")


if __name__ == "__main__":
    main()
