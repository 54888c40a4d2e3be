"""The counted memory against what torch really allocates on a CPU."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from smallcap.batch_size import VisionTower, image_memory, largest_batch, largest_batch_here
from smallcap.benchmark.random_content import build_model
from smallcap.captioner import Captioner
from smallcap.config import GenerationConfig
from smallcap.decoding.engine import prefill
from smallcap.decoding.kv_cache import KVCache
from smallcap.images.crops import Pixels
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint

PROMPT_TOKENS = 60


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch's CPU allocator has given out at one time while `run` ran, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    allocated, peak = 0, 0
    pending = list(profiled.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    changes: list[tuple[int, int]] = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, change in sorted(changes, key=lambda change: change[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak


@pytest.fixture(scope="module", params=["tiny", pytest.param("gpt2", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> SmallCapModel:
    if request.param == "gpt2":
        return build_model(4, "cpu", "float32")
    return load_checkpoint(str(request.getfixturevalue("tiny_smallcap")))


def options(model: SmallCapModel, num_beams: int = 3):  # type: ignore[no-untyped-def]
    return model.generation_options(GenerationConfig(num_beams=num_beams, max_new_tokens=12))


@pytest.mark.parametrize(("num_beams", "dtype"), [(1, "float32"), (3, "float32"), (3, "bfloat16")])
def test_keys_and_values_are_counted_to_the_byte(model: SmallCapModel, num_beams: int, dtype: str) -> None:
    generation, decoder = options(model, num_beams), model.decoder.config
    counted = image_memory(model.config, None, generation, PROMPT_TOKENS, dtype)
    mask = torch.ones(5, PROMPT_TOKENS, dtype=torch.bool)
    shape = (decoder.num_layers, decoder.num_heads, decoder.head_dim)
    cache = KVCache(shape, mask, num_beams, generation.max_new_tokens - 1, getattr(torch, dtype))
    assert cache.keys.nbytes + cache.values.nbytes == 5 * counted.kv_cache
    if dtype == "float32":
        pixels = torch.zeros(2, 3, *[model.config.vision["image_size"]] * 2)
        cross_kv = model.decoder.cross_attention_kv(model.encode_images(pixels))
        assert sum(keys.nbytes + values.nbytes for keys, values in cross_kv) == 2 * counted.cross_attention


def test_the_whole_peak_is_of_the_counted_size(model: SmallCapModel) -> None:
    """One batch against half of it: what both have in common, as the workspaces of matrix products, falls out."""
    generation = options(model)
    counted = image_memory(model.config, None, generation, PROMPT_TOKENS, "float32")
    side, vocabulary = model.config.vision["image_size"], model.decoder.config.vocab_size
    random = np.random.default_rng(0)

    def caption(count: int) -> None:
        pixels = torch.zeros(count, 3, side, side)
        prompts = [random.integers(0, vocabulary, PROMPT_TOKENS).tolist() for _ in range(count)]
        model.generate(model.encode_images(pixels), prompts, generation)

    caption(2)
    growth = (peak_bytes(lambda: caption(6)) - peak_bytes(lambda: caption(3))) / 3
    print(f"counted {counted.bytes / 1e6:.2f} MB, allocated {growth / 1e6:.2f} MB per image")
    assert growth / 2 < counted.bytes < growth * 3


def test_a_batch_is_what_fits_and_never_nothing(model: SmallCapModel) -> None:
    generation = options(model)

    def fitting(free_bytes: int, device: str = "cpu") -> int:
        return largest_batch(model.config, None, generation, PROMPT_TOKENS, free_bytes, "float32", device)

    assert fitting(0) == 1
    assert fitting(1 << 50) == 64
    assert fitting(1 << 50, "cuda") == 512
    sizes = [fitting(bytes_) for bytes_ in range(0, 4 << 30, 64 << 20)]
    assert sizes == sorted(sizes)
    counted = image_memory(model.config, None, generation, PROMPT_TOKENS, "float32", "cuda")
    assert fitting(100 * counted.bytes, "cuda") == 64  # 80 would be padded to 128
    for images in (1, 2, 3, 4, 5, 127, 128, 129):
        assert fitting(images * counted.bytes * 5 // 4 + 5, "cuda") == 1 << images.bit_length() - 1


def test_more_beams_samples_and_a_second_encoder_take_more(model: SmallCapModel) -> None:
    one = image_memory(model.config, None, options(model, 1), PROMPT_TOKENS, "float32")
    three = image_memory(model.config, None, options(model), PROMPT_TOKENS, "float32")
    assert three.logits == 3 * one.logits
    assert three.kv_cache > one.kv_cache
    sampled = model.generation_options(GenerationConfig(do_sample=True, num_captions=3, max_new_tokens=12))
    assert image_memory(model.config, None, sampled, PROMPT_TOKENS, "float32").logits > three.logits
    big = VisionTower(448, 128, None)
    assert image_memory(model.config, big, options(model), PROMPT_TOKENS, "float32").encoder > three.encoder


@pytest.mark.parametrize(("name", "expected"), [("RN50", (224, 64, None)), ("ViT-B-32", (224, 768, 32))])
def test_a_towers_sizes_are_read_off_it(name: str, expected: tuple[int, int, int | None]) -> None:
    import open_clip

    with torch.device("meta"):
        tower = open_clip.create_model(name, load_weights=False, device="meta").visual
    assert dataclasses.astuple(VisionTower.from_module(tower, 224)) == expected


@pytest.mark.slow
def test_a_resnets_peak_is_of_the_counted_size() -> None:
    import open_clip

    tower = open_clip.create_model("RN50").visual.eval()
    counted = VisionTower.from_module(tower, 224).values * 4

    @torch.inference_mode()
    def encode(count: int) -> None:
        tower(torch.zeros(count, 3, 224, 224))

    encode(2)
    growth = (peak_bytes(lambda: encode(8)) - peak_bytes(lambda: encode(4))) / 4
    assert growth / 2 < counted < growth * 3


def test_a_loaded_captioner_asks_its_machine(tiny_smallcap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Captioner.from_pretrained(str(tiny_smallcap), k=0, dtype="float32")
    assert largest_batch_here(captioner) == 64
    monkeypatch.setattr("smallcap.batch_size.available_bytes", lambda: 200 << 20)
    alone, shared = largest_batch_here(captioner), largest_batch_here(captioner, actors=3)
    assert 1 <= shared < alone <= 64
    crop = Pixels(np.zeros((32, 32, 3), np.uint8), None, 32, 32)
    assert len(captioner.caption_batch([crop] * alone)) == alone


def test_prefill_is_what_the_count_says_on_a_gpu(model: SmallCapModel) -> None:
    """A CPU prefills some prompts at a time; the sum over all of them bounds what a GPU does at once."""
    counted = image_memory(model.config, None, options(model), PROMPT_TOKENS, "float32", "cuda")
    hidden_states = model.encode_images(torch.zeros(1, 3, *[model.config.vision["image_size"]] * 2))
    growth = peak_bytes(lambda: prefill(model.decoder, hidden_states, [[1] * PROMPT_TOKENS], options(model)))
    one_beam = counted.logits / 3
    expected = counted.prefill + counted.kv_cache + counted.cross_attention + one_beam
    print(f"counted {expected / 1e6:.2f} MB, allocated {growth / 1e6:.2f} MB")
    assert growth / 3 < expected < growth * 3
