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
from demo.train_cross_attention import CrossAttentionRecipe, train_cross_attention
from demo.train_language_model import train_language_model
from demo.training import Recipe
from demo.world import TRAINING, WEB
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


def make_model(work: Path) -> None:
    """Trains CLIP, GPT-2 and cross-attention below `work`, in this order: each needs those before it."""
    clip, cross_attention = ClipRecipe(), CrossAttentionRecipe()
    start = time.perf_counter()
    web_images = render_pool(WEB, clip.scenes, work)
    images = render_pool(TRAINING, cross_attention.scenes, work)
    print(f"scenes: {time.perf_counter() - start:.0f} s", flush=True)
    tokenizer = train_tokenizer()

    def make_clip(folder: Path) -> None:
        wrapped = clip_form(tokenizer)
        save_clip(train_clip(clip, web_images, wrapped), wrapped, folder)

    def make_language_model(folder: Path) -> None:
        train_language_model(Recipe(), tokenizer).save_pretrained(folder)
        save_gpt2_tokenizer(tokenizer, folder)

    def make_smallcap(folder: Path) -> None:
        train_cross_attention(cross_attention, work / "clip", work / "language-model", images, folder)

    run_step("clip", work / "clip", make_clip)
    run_step("language model", work / "language-model", make_language_model)
    run_step("cross-attention", work / "smallcap", make_smallcap)


def publish(work: Path) -> None:
    """Puts what ships into `demo/`: the models, the test images, the dumps and the references."""
    for model in ("clip", "smallcap"):
        target = DEMO / "model" / model
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(work / model, target)
    for images in ("images", "images-held-out"):
        shutil.rmtree(DEMO / images, ignore_errors=True)
    write_shipped(DEMO)


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
    make_model(arguments.work_dir)
    publish(arguments.work_dir)
    index = build_demo_index("out/demo/index").index_uri
    evaluate(Captioner.from_pretrained("demo", index), 600, arguments.work_dir / "evaluation.json")


if __name__ == "__main__":
    main()
