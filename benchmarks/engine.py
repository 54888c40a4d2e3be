"""Times the captioning engine at real sizes with random weights, without Ray, images or an index.

CLIP ViT-B/32 and GPT-2 124M with cross-attention of reduce factor 4, prompts of 66 tokens (k = 4), 3 beams, always 25
new tokens: random weights hardly ever end a caption, which is the worst case. The last line is JSON.

    make bench        or        python -m benchmarks.engine --images 32 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch

from smallcap.checkpoint import SmallCapConfig, SmallCapModel
from smallcap.text_decoder import DecoderConfig

PROMPT_TOKENS = 66

VIT_B_32 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
GPT2_124M = DecoderConfig(
    model_type="this_gpt2",
    vocab_size=50257,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    ffn_size=3072,
    max_positions=1024,
    encoder_hidden_size=768,
    cross_attention_reduce_factor=4,
    layer_norm_eps=1e-5,
    activation="gelu_new",
    dropout=0.1,
)


def build_model(device: str, dtype: str) -> SmallCapModel:
    """Returns the published sizes with random weights."""
    torch.manual_seed(0)
    model = SmallCapModel(SmallCapConfig({"vision_config": VIT_B_32}, GPT2_124M, eos_token_id=13, pad_token_id=0))
    return model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def seconds_per_call(call: Callable[[], object], repeats: int, device: str) -> float:
    """Returns the least time of several calls after one warm-up; the least, because other processes only add to it."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Runs the benchmark and prints images per second by stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="images per batch")
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = build_model(options.device, options.dtype)
    pixel_values = torch.randn(options.images, 3, 224, 224, device=options.device)
    hidden_states = model.encode_images(pixel_values)
    prompts = torch.randint(20, 50_000, (options.images, PROMPT_TOKENS)).tolist()
    stages = {
        "encode": lambda: model.encode_images(pixel_values),
        "prefill and one token": lambda: model.generate(hidden_states, prompts, options.num_beams, max_new_tokens=1),
        "prefill and 25 tokens": lambda: model.generate(hidden_states, prompts, options.num_beams, max_new_tokens=25),
    }
    rates = {}
    for name, call in stages.items():
        rates[name] = options.images / seconds_per_call(call, options.repeats, options.device)
        print(f"{name:22} {rates[name]:9.2f} images/s")
    whole = 1 / (1 / rates["encode"] + 1 / rates["prefill and 25 tokens"])
    print(f"{'encode and generate':22} {whole:9.2f} images/s")
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(json.dumps({"images_per_s": whole, "stages": rates, **vars(options), **machine}))


if __name__ == "__main__":
    main()
