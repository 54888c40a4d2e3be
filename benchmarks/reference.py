"""Times smallcap's engine and the reference implementation's way to caption, in one process on one machine.

The reference (RitaRamo/smallcap, infer.py) captions one image at a time in float32 when it retrieves: CLIP, then
transformers' `generate` with 3 beams, where the prompt is computed once per beam. This is rebuilt here from
transformers' GPT-2 with cross-attention. transformers has no reduced cross-attention, so both sides have a reduce
factor of 1. Sizes, prompts and the 25 tokens are the same on both sides; the weights are random.

    python -m benchmarks.reference --images 64
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

from smallcap.benchmark.random_content import GPT2_124M, VIT_B_32, build_model
from smallcap.generation_config import GenerationConfig
from smallcap.machine.precision import matrix_rate, resolve_dtype
from smallcap.machine.process_memory import keep_freed_memory

PROMPT_TOKENS = 66
NEW_TOKENS = 25
BEAMS = 3


def reference_captioner() -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    """Returns a function that captions one image as the reference does."""
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(**VIT_B_32)).eval()
    gpt2 = GPT2LMHeadModel(GPT2Config(add_cross_attention=True, vocab_size=GPT2_124M.vocab_size)).eval()

    @torch.inference_mode()
    def caption(pixel_values: torch.Tensor, prompt: list[int]) -> torch.Tensor:
        hidden_states = clip(pixel_values=pixel_values).last_hidden_state
        return gpt2.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            encoder_hidden_states=hidden_states,
            num_beams=BEAMS,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            early_stopping=True,
            length_penalty=0.0,
            do_sample=False,
            pad_token_id=0,
        )

    return caption


def main() -> None:
    """Times both in turns and prints the ratio of their rates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="images in smallcap's batch")
    parser.add_argument("--dtype", default="auto", help="precision of smallcap's side")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    dtype = resolve_dtype(arguments.dtype, "cpu")
    model = build_model(reduce_factor=1, device="cpu", dtype=dtype)
    model.pack()
    options = model.generation_options(GenerationConfig(num_beams=BEAMS, max_new_tokens=NEW_TOKENS))
    reference = reference_captioner()
    pixels = torch.randn(arguments.images, 3, 224, 224)
    prompts = torch.randint(20, 50_000, (arguments.images, PROMPT_TOKENS)).tolist()

    def caption_with_smallcap() -> None:
        generated = model.generate(model.encode_images(pixels), prompts, options)
        assert all(len(best.token_ids) == NEW_TOKENS for (best,) in generated), "a random caption ended early"

    reference(pixels[:1], prompts[0])
    caption_with_smallcap()
    rates: dict[str, list[float]] = {"reference": [], "smallcap": []}
    for number in range(arguments.rounds):
        start = time.perf_counter()
        reference(pixels[number : number + 1], prompts[number])
        middle = time.perf_counter()
        caption_with_smallcap()
        rates["reference"].append(1 / (middle - start))
        rates["smallcap"].append(arguments.images / (time.perf_counter() - middle))
    best = {name: max(values) for name, values in rates.items()}
    fp32 = matrix_rate(torch.float32, seconds=0.5) / 1e12
    low = matrix_rate(getattr(torch, dtype), seconds=0.5) / 1e12
    for name, rate in best.items():
        print(f"{name:10} {rate:8.3f} images/s")
    print(f"ratio {best['smallcap'] / best['reference']:.1f} (float32 {fp32:.3f} TFLOP/s, {dtype} {low:.3f} TFLOP/s)")
    print(json.dumps({"images_per_s": best, "dtype": dtype, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
