"""Computes on paper how fast an actor would caption on a GPU; nothing here is measured, and no GPU is needed.

Operations are those that `smallcap.benchmark.operations` counts for the published sizes: CLIP ViT-B/32 as both
encoders, GPT-2 124M, reduce factor 4, k = 4, 3 beams. A stage takes the longer of its arithmetic and its memory
traffic, at assumed shares of the card's published peaks, and a fixed time for each kernel. An actor's stages share the
GPU, so their times add up. The host's CPU time for an image (`smallcap bench --host`) is a bound of its own.

    python -m benchmarks.paper --host-us 60 --price h200=4 --price l4=1
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from smallcap.benchmark.operations import decode_flops, prefill_flops, vision_flops
from smallcap.benchmark.random_content import GPT2_124M, VIT_B_32, realistic_lengths
from smallcap.decoding.cuda_graphs import GraphStepper
from smallcap.machine.shapes import rows_on_gpu
from smallcap.model.checkpoint import SmallCapConfig, SmallCapModel

ARITHMETIC_SHARE, MEMORY_SHARE = 0.5, 0.7  # assumed, of the peaks
KERNEL_S = 2e-6  # assumed, for a small kernel within a CUDA graph
# Launches of each stage, counted by running it on a pretended device.
KERNELS = {"vision encoder": 180, "prefill": 302, "decode step": 263, "clip score": 180, "search": 30}
PROMPT_TOKENS, PADDED_PROMPT_TOKENS = 68, 112  # on average; of the batch, a multiple of 16
TEXT_TOKENS, TEXT_PARAMETERS = 16, 38e6  # of CLIP's text encoder, without its embedding
DIM, BEAMS, BYTES = 512, 3, 2  # bfloat16
CROP_BYTES = 3 * 224**2


@dataclass(frozen=True)
class Card:
    """A GPU's published peaks: dense bfloat16 products without sparsity, memory, and its link to the host."""

    name: str
    flops: float
    bytes_per_s: float
    link_bytes_per_s: float
    batch: int  # images that fit with an index beside them


CARDS = (
    Card("H200", 989e12, 4.8e12, 50e9, 256),
    Card("H100", 989e12, 3.35e12, 50e9, 256),
    Card("A10G", 70e12, 0.6e12, 25e9, 128),
    Card("L4", 121e12, 0.3e12, 25e9, 128),
)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=1_000_000, help="in the index, searched exactly")
    parser.add_argument("--host-us", type=float, default=60.0, help="the host's CPU time for an image, in us")
    parser.add_argument("--price", action="append", default=[], metavar="CARD=DOLLARS", help="of an hour")
    arguments = parser.parse_args()
    prices = {name.lower(): float(price) for name, _, price in (text.partition("=") for text in arguments.price)}
    print("On paper, ms for a batch:")
    stages = list(stage_seconds(CARDS[0], arguments.captions))
    print(
        f"{'card':6}{'batch':>6}",
        *(f"{stage:>15}" for stage in stages),
        f"{'images/s':>10} bound  GPU-h/million  $/million",
    )
    for card in CARDS:
        seconds = stage_seconds(card, arguments.captions)
        rates = {
            "GPU": card.batch / sum(seconds.values()),
            "host": 1e6 / arguments.host_us,
            "link": card.link_bytes_per_s / CROP_BYTES,
        }
        bound = min(rates, key=lambda name: rates[name])
        hours = 1e6 / rates[bound] / 3600
        price = prices.get(card.name.lower())
        columns = " ".join(f"{1e3 * value:15.1f}" for value in seconds.values())
        cost = "" if price is None else f"{hours * price:10.2f}"
        print(f"{card.name:6}{card.batch:6} {columns} {rates[bound]:10,.0f} {bound:5} {hours:14.3f} {cost}")


def stage_seconds(card: Card, captions: int) -> dict[str, float]:
    """Returns the seconds of each stage for a batch.

    Args:
        card: The GPU.
        captions: How many captions the index has.
    """
    with torch.device("meta"):
        model = SmallCapModel(SmallCapConfig({"vision_config": VIT_B_32}, GPT2_124M, 13, 0))
    batch = card.batch
    encoder_bytes, decoder_bytes = (
        BYTES * sum(parameter.numel() for parameter in part.parameters()) for part in (model.encoder, model.decoder)
    )
    padding = PADDED_PROMPT_TOKENS / PROMPT_TOKENS
    lengths = np.array(realistic_lengths(batch))
    steps = range(1, int(lengths.max()), GraphStepper.steps_per_check)
    # A batch has a power of two of rows, and is looked at after each graph.
    rows = [rows_on_gpu(int((lengths > step).sum())) for step in steps]
    per_step = decode_flops(model, PADDED_PROMPT_TOKENS, 2, BEAMS)
    cache_bytes = 2 * GPT2_124M.num_layers * GPT2_124M.hidden_size * BYTES * (PADDED_PROMPT_TOKENS + 36)
    step_seconds = [
        _seconds(
            card,
            count * per_step,
            decoder_bytes + count * (cache_bytes + 12 * BEAMS * GPT2_124M.vocab_size),
            "decode step",
        )
        for count in rows
    ]
    return {
        "vision encoder": _seconds(card, batch * vision_flops(model), encoder_bytes, "vision encoder"),
        "search": _seconds(card, 2.0 * batch * captions * DIM, captions * (DIM * BYTES + 8.0 * batch), "search"),
        "prefill": _seconds(card, batch * padding * prefill_flops(model, PROMPT_TOKENS), decoder_bytes, "prefill"),
        "decode": GraphStepper.steps_per_check * sum(step_seconds),
        "clip score": _seconds(
            card, 2.0 * batch * TEXT_TOKENS * TEXT_PARAMETERS, BYTES * TEXT_PARAMETERS, "clip score"
        ),
    }


def _seconds(card: Card, flops: float, moved_bytes: float, stage: str) -> float:
    arithmetic, memory = flops / (ARITHMETIC_SHARE * card.flops), moved_bytes / (MEMORY_SHARE * card.bytes_per_s)
    return max(arithmetic, memory) + KERNELS[stage] * KERNEL_S


if __name__ == "__main__":
    main()
