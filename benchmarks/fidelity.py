"""Measures what low precision costs: how many captions stay the same, and how far log probabilities move.

There are two models: the demo's, on its shipped test scenes with retrieval, and one of the published sizes with random
weights. The second is the worst case: its distributions are nearly flat, so any rounding tips a beam. The captions in
float32 are the truth; each precision computes their log probability again (teacher forcing).

    python -m benchmarks.fidelity
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from smallcap.benchmark.random_content import build_model
from smallcap.captioner import Captioner
from smallcap.model.checkpoint import SmallCapModel
from smallcap.model.prompt import build_training_example, encode_texts
from smallcap.training.objective import caption_loss, collate

TRUTH = "float32"
RANDOM_PROMPT_TOKENS = 66


@dataclass(frozen=True)
class Fidelity:
    """One model in one precision, compared with float32."""

    model: str
    dtype: str
    captions: int
    identical: int
    mean_difference: float  # mean absolute difference in the log probability of float32's captions, nats per token
    bias: float  # the same with signs


@torch.inference_mode()
def logprob(model: SmallCapModel, hidden_states: Tensor, prompt: Sequence[int], caption: Sequence[int]) -> float:
    """Returns the log probability per token of a caption after a prompt; hidden_states: [P, Hv]."""
    example = build_training_example(prompt, caption[:-1], caption[-1], model.config.pad_token_id)
    return -caption_loss(model.decoder, hidden_states[None], *collate([example], model.config.pad_token_id)).item()


def compare_demo(index: str, folder: Path, precisions: Sequence[str]) -> list[Fidelity]:
    """Captions the demo's scenes in every precision."""
    photos = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    captioners = {dtype: Captioner.from_pretrained("demo", index, dtype=dtype) for dtype in (TRUTH, *precisions)}
    captions = {dtype: captioner.caption(photos) for dtype, captioner in captioners.items()}
    results = []
    for dtype in precisions:
        differences = []
        for photo, truth in zip(photos, captions[TRUTH], strict=True):
            values = {}
            for name in (TRUTH, dtype):
                captioner = captioners[name]
                template, eos = captioner.model.config.template, captioner.generation.eos_token_id
                texts = [neighbour.text for neighbour in truth.neighbours]
                prompt, caption = encode_texts(captioner.tokenizer, [template.fill(texts), truth.caption or ""])
                hidden_states, _ = captioner.encode([captioner.crop_plan.crop(photo)])
                values[name] = logprob(captioner.model, hidden_states[0], prompt, [*caption, eos])
            differences.append(values[dtype] - values[TRUTH])
        same = sum(a.caption == b.caption for a, b in zip(captions[TRUTH], captions[dtype], strict=True))
        results.append(_summarise("demo", dtype, same, differences))
    return results


def compare_random(images: int, precisions: Sequence[str]) -> list[Fidelity]:
    """Captions random inputs with the published sizes in every precision."""
    torch.manual_seed(1)
    pixels = torch.randn(images, 3, 224, 224)
    prompts = torch.randint(20, 50_000, (images, RANDOM_PROMPT_TOKENS)).tolist()
    logprobs: dict[str, list[float]] = {}
    captions: dict[str, list[list[int]]] = {}
    for dtype in (TRUTH, *precisions):
        model = build_model(4, "cpu", dtype)
        model.pack()
        hidden_states = model.encode_images(pixels)
        captions[dtype] = [best.token_ids for (best,) in model.generate(hidden_states, prompts)]
        cases = zip(hidden_states, prompts, captions[TRUTH], strict=True)
        logprobs[dtype] = [logprob(model, *case) for case in cases]
    return [
        _summarise(
            "random, published sizes",
            dtype,
            sum(a == b for a, b in zip(captions[dtype], captions[TRUTH], strict=True)),
            [a - b for a, b in zip(logprobs[dtype], logprobs[TRUTH], strict=True)],
        )
        for dtype in precisions
    ]


def _summarise(model: str, dtype: str, identical: int, differences: Sequence[float]) -> Fidelity:
    count = len(differences)
    return Fidelity(model, dtype, count, identical, sum(map(abs, differences)) / count, sum(differences) / count)


def main() -> None:
    """Prints both comparisons; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--index", default="out/demo/index", help="the demo's index, as `make demo` builds it")
    parser.add_argument("--scenes", type=Path, default=Path("demo/images"), help="folder of JPEG files")
    parser.add_argument("--random-images", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], help="float16 is slow on most CPUs")
    arguments = parser.parse_args()
    results = compare_demo(arguments.index, arguments.scenes, arguments.dtypes)
    results += compare_random(arguments.random_images, arguments.dtypes)
    for result in results:
        same = f"{result.model:24} {result.dtype:9} {result.identical}/{result.captions} captions identical"
        moved = f"{result.mean_difference:.4f} nats (bias {result.bias:+.4f})"
        print(f"{same}, log probability per token off by {moved}")
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
