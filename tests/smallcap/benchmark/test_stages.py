"""The benchmark's counts against torch's, and one small run of all of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from smallcap.benchmark import stages
from smallcap.benchmark.operations import decode_flops, prefill_flops, torch_flops, vision_flops
from smallcap.benchmark.random_content import GPT2_124M, PlannedLengths, build_model, random_captions, realistic_lengths
from smallcap.benchmark.stages import run_benchmark
from smallcap.captioner import Captioner
from smallcap.config import BenchmarkOptions, GenerationConfig
from smallcap.decoding.beam_search import BeamSearch
from smallcap.decoding.engine import generate, prefill
from smallcap.images.crops import Pixels
from smallcap.machine.precision import matrix_rate
from smallcap.model.checkpoint import SmallCapModel


@pytest.fixture(scope="module")
def model() -> SmallCapModel:
    return build_model(4, "cpu", "float32")


def test_counted_operations_are_torchs(model: SmallCapModel) -> None:
    """Nearly: torch counts masked attention as well, and on some devices no attention."""
    packed = build_model(4, "cpu", "bfloat16")
    packed.pack()
    for either in (model, packed):
        counted = torch_flops(lambda either=either: either.encode_images(torch.zeros(2, 3, 224, 224))) / 2
        assert counted == pytest.approx(vision_flops(either), rel=0.03)
    hidden_states, prompts = torch.zeros(2, 50, 768), [[5] * 60, [6] * 60]
    options = replace(model.generation_options(GenerationConfig()), max_new_tokens=8)
    counted_prefill = torch_flops(lambda: prefill(model.decoder, hidden_states, prompts, options)) / 2
    assert counted_prefill == pytest.approx(prefill_flops(model, 60), rel=0.03)
    planned = replace(options, strategy=type("Eight", (PlannedLengths,), {"planned": (8,)}))
    counted_whole = torch_flops(lambda: generate(model.decoder, hidden_states, prompts, planned)) / 2
    assert counted_whole - counted_prefill == pytest.approx(decode_flops(model, 60, 8, 3), rel=0.03)


def test_planned_lengths_are_kept_and_stand_for_real_captions(model: SmallCapModel) -> None:
    lengths = realistic_lengths(12)
    assert 9 < sum(realistic_lengths(1000)) / 1000 < 13
    options = replace(
        model.generation_options(GenerationConfig()), strategy=type("Planned", (PlannedLengths,), {"planned": lengths})
    )
    generated = model.generate(torch.randn(12, 50, 768), [[7] * 20] * 12, options)
    assert tuple(len(best.token_ids) for (best,) in generated) == lengths
    assert BeamSearch in PlannedLengths.__mro__


@pytest.mark.slow
def test_a_run_measures_every_stage_and_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products alone were measured at a slow moment, and yet nothing is said to be faster than the machine."""
    monkeypatch.setattr(stages, "matrix_rate", lambda *_, **__: 1e6)
    batches_seen = []

    def make_loop(captioner: Captioner, batches: Sequence[Sequence[Pixels]]) -> Callable[[], int]:
        batches_seen.extend(batches)
        return lambda: sum(len(results) for results in captioner.caption_batches([(batch, None) for batch in batches]))

    options = BenchmarkOptions(device="cpu", images=4, batch_size=2, captions=200, repeats=1)
    result = run_benchmark(options, make_loop)
    assert len({image.content_key for batch in batches_seen for image in batch}) == 4  # no two alike
    values = json.loads(result.to_json())
    assert {"images_per_s", "matrix_tflops", "mfu"} <= values.keys()
    assert {stage["stage"] for stage in values["stages"]} >= {
        "decode image", "preprocess", "vision encoder", "retrieval encoder", "search", "prefill", "decode tokens",
        "detokenise", "load JPEG, 640 px, fast", "load JPEG, 256 px, fast",
    }  # fmt: skip
    assert all(stage["images_per_s"] > 0 for stage in values["stages"])
    shares = [stage["share"] for stage in values["stages"] if stage["share"] is not None]
    assert all(0 < share <= 1 for share in (*shares, result.mfu, result.mfu_full_length))
    assert max(*shares, result.mfu, result.mfu_full_length) == 1
    (vision,) = (stage for stage in result.stages if stage.stage == "vision encoder")
    assert vision.gflop_per_image == pytest.approx(8.8, rel=0.01)  # ViT-B/32 on 224 px
    assert GPT2_124M.vocab_size == 50257
    assert len(random_captions(30)) == 30


def test_products_have_a_speed() -> None:
    assert matrix_rate(torch.float32, seconds=0.01) > 1e8
