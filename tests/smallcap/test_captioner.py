import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import smallcap
from smallcap.captioned import CaptionedBatch, CaptionResult
from smallcap.captioner import Captioner
from smallcap.captioner_setup import CaptionerOptions
from smallcap.errors import ConfigError, ErrorCode, IndexIntegrityError
from smallcap.images.crops import Pixels
from smallcap.model.checkpoint import load_checkpoint
from smallcap.model.encoder_spec import load_crop_plan
from tests.caption_runs import jpeg
from tests.index_files import build_text_index

CAPTIONS = [
    f"{number} {noun} on a {place}" for number in (1, 2, 3) for noun in ("dog", "bus") for place in ("road", "hill")
]


@pytest.fixture(scope="module")
def index(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("captioner")
    rows = [f"photo-{number % 6}.jpg,{caption}" for number, caption in enumerate(CAPTIONS)]
    return build_text_index(folder, tiny_clip, rows)


@pytest.fixture(scope="module")
def captioner(index: str, tiny_smallcap: Path) -> Captioner:
    return Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32")


def test_a_batch_is_its_images_alone(captioner: Captioner) -> None:
    images = [jpeg(seed) for seed in range(5)]
    together = captioner.caption(images)
    assert len({result.caption for result in together}) > 1  # the images matter
    for image, result in zip(images, together, strict=True):
        (alone,) = captioner.caption([image])
        assert alone.caption == result.caption
        assert [n.caption_id for n in alone.neighbours] == [n.caption_id for n in result.neighbours]
        assert alone.logprob == pytest.approx(result.logprob, abs=1e-3)


def test_the_next_best_beam_takes_the_place_of_an_empty_caption(
    captioner: Captioner, index: str, tiny_smallcap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [jpeg(seed) for seed in range(4)]
    several = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32", num_captions=3).caption(images)
    first = {several[image].caption for image in (0, 2)}
    decode = smallcap.captioner.decode_captions

    def with_empty(*arguments: Any) -> list[str]:
        return ["" if text in first else text for text in decode(*arguments)]

    monkeypatch.setattr("smallcap.captioner.decode_captions", with_empty)
    results = captioner.caption(images)
    for result, expected in zip(results, several, strict=True):
        beams = [(expected.caption, expected.logprob), *((one.caption, one.logprob) for one in expected.alternatives)]
        text, logprob = next((text, logprob) for text, logprob in beams if text not in first)
        assert result.caption == text
        assert result.logprob == pytest.approx(logprob, abs=1e-3)
        assert result.clip_score is not None
    monkeypatch.setattr("smallcap.captioner.decode_captions", lambda *arguments: ["" for _ in decode(*arguments)])
    assert [result.caption for result in captioner.caption(images)] == [""] * 4


@pytest.mark.parametrize("wanted", [1, 2])
def test_beams_are_ranked_again_by_their_cosine_with_the_image(wanted: int, index: str, tiny_smallcap: Path) -> None:
    images, model = [jpeg(seed) for seed in range(4)], str(tiny_smallcap)
    plain = Captioner.from_pretrained(model, index, dtype="float32", num_beams=4, num_captions=4).caption(images)
    ranking = Captioner.from_pretrained(model, index, dtype="float32", num_beams=4, num_captions=wanted, rerank=True)
    encoder = ranking.retrieval_encoder
    assert encoder is not None
    for result, expected in zip(ranking.caption(images), plain, strict=True):
        beams = [expected.caption or "", *(one.caption for one in expected.alternatives)]
        assert expected.embedding is not None
        cosines = encoder.encode_texts(beams) @ expected.embedding
        order = np.argsort(-cosines, kind="stable")[:wanted]
        assert [result.caption, *(one.caption for one in result.alternatives)] == [beams[place] for place in order]
        assert result.clip_score == pytest.approx(float(cosines[order[0]]), abs=1e-5)
    for options in ({"k": 0}, {"clip_score": False}):
        with pytest.raises(ConfigError, match="ranked again by their clip scores"):
            Captioner.from_pretrained(model, index, rerank=True, **options)


def test_neighbours_are_the_nearest_captions(captioner: Captioner) -> None:
    (result,) = captioner.caption([jpeg(0)])
    assert captioner.retrieval_encoder is not None
    pixels = captioner.crop_plan.crop(jpeg(0))
    query = captioner.embed([pixels], captioner.encode([pixels])[1])
    scores = query[0] @ captioner.retrieval_encoder.encode_texts(CAPTIONS).T
    best = np.argsort(-scores)[:4]
    assert {n.text for n in result.neighbours} == {CAPTIONS[row] for row in best}
    assert [n.score for n in result.neighbours] == pytest.approx(sorted(scores[best], reverse=True), abs=1e-5)
    assert result.clip_score is not None
    caption_embeddings = captioner.retrieval_encoder.encode_texts([result.caption or ""])
    assert result.clip_score == pytest.approx(float(query[0] @ caption_embeddings[0]), abs=1e-5)


def test_the_vision_tower_is_shared(captioner: Captioner, index: str, tiny_smallcap: Path, other_clip: Path) -> None:
    assert captioner.shares_encoder
    assert captioner.crop_plan == load_crop_plan(str(tiny_smallcap), captioner.retriever.manifest.encoder.spec)  # type: ignore[union-attr]
    assert captioner.crop_plan.retrieval is None
    with pytest.raises(IndexIntegrityError, match="another retrieval encoder"):
        Captioner.from_pretrained(str(tiny_smallcap), index, retrieval_encoder=f"hf:{other_clip}")


def test_a_bad_image_is_a_result_with_an_error_among_the_others(captioner: Captioner) -> None:
    good, bad, pillow = captioner.caption([jpeg(0), b"no image", Image.new("L", (30, 30))])
    assert good.caption == captioner.caption([jpeg(0)])[0].caption
    assert bad.error is not None
    assert bad.error.code == ErrorCode.NOT_AN_IMAGE
    assert bad.caption is None
    assert pillow.error is None
    assert captioner.caption([b""])[0].error is not None
    assert captioner.caption([]) == []


def test_an_image_is_captioned_alike_in_every_form(captioner: Captioner, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(3))
    opened = Image.open(path)
    given = [str(path), path, f"file://{path}", jpeg(3), opened, np.asarray(opened)]
    assert captioner.caption(given) == captioner.caption([jpeg(3)] * len(given))
    missing, found = captioner.caption(iter([tmp_path / "no.jpg", path]), image_ids=("no", None))
    assert missing.error is not None and (missing.error.code, missing.error.where) == (
        ErrorCode.NOT_FOUND,
        f"{tmp_path}/no.jpg",
    )
    assert found.caption is not None
    with pytest.raises(TypeError, match=r"images\[1\]: .* found NoneType"):
        captioner.caption([path, None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"found str\. For one image write \[image\]"):
        captioner.caption(str(path))
    with pytest.raises(ValueError, match="expected 2 ids"):
        captioner.caption([path, path], image_ids=["a"])


def test_an_images_own_captions_can_be_excluded(captioner: Captioner) -> None:
    (plain,) = captioner.caption([jpeg(0)])
    store = captioner.retriever.captions  # type: ignore[union-attr]
    own_images = store.image_ids(np.array([plain.neighbours[0].caption_id]))[0].as_py()
    (excluded,) = captioner.caption([jpeg(0)], image_ids=[own_images[0]])
    assert len(excluded.neighbours) == 4
    found = store.image_ids(np.array([n.caption_id for n in excluded.neighbours])).to_pylist()
    assert all(own_images[0] not in images for images in found)


@pytest.mark.slow
def test_compiled_encoders_give_the_same_captions(tiny_smallcap: Path) -> None:
    plain, compiled = (
        Captioner.from_pretrained(str(tiny_smallcap), k=0, dtype="float32", compile_encoders=compiles)
        for compiles in (False, True)
    )
    images = [jpeg(seed) for seed in range(3)]
    expected = [result.caption for result in plain.caption(images)]
    assert [result.caption for result in compiled.caption(images)] == expected


def test_compiled_encoders_run_while_no_steps_are_recorded(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling waits for the whole GPU, which a recording in another thread does not survive."""
    events = []

    @contextmanager
    def no_recording() -> Iterator[None]:
        events.append("held")
        yield
        events.append("free")

    monkeypatch.setattr("smallcap.captioner.no_recording", no_recording)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: events.append("compiled"))
    monkeypatch.setattr(captioner, "_encoding", captioner._encoding)  # put back afterwards
    hook = captioner.model.encoder.register_forward_pre_hook(lambda *_: events.append("encoded"))
    pixels = [captioner.crop_plan.crop(jpeg(0))]
    captioner.encode(pixels)
    captioner.compile_encoders()
    captioner.encode(pixels)
    hook.remove()
    assert events == ["encoded", "compiled", "held", "encoded", "free"]


def test_options_are_fields_and_keywords_and_without_retrieval_no_index_is_needed(tiny_smallcap: Path) -> None:
    options = CaptionerOptions(k=0, num_beams=2, dtype="float32")
    captioner = Captioner.from_pretrained(str(tiny_smallcap), options=options, num_beams=1)
    assert (captioner.k, captioner.generation.num_beams, captioner.model.dtype) == (0, 1, torch.float32)
    decoding = smallcap.GenerationConfig(num_beams=1, max_new_tokens=3)
    only_decoding = Captioner.from_pretrained(str(tiny_smallcap), options=decoding, k=0)
    assert (only_decoding.generation.num_beams, only_decoding.generation.max_new_tokens) == (1, 3)
    (result,) = captioner.caption([jpeg(0)])
    assert result.caption is not None
    assert result.neighbours == ()
    assert result.clip_score is None
    with pytest.raises(ConfigError, match="Retrieval needs an index"):
        Captioner.from_pretrained(str(tiny_smallcap))
    with pytest.raises(ConfigError, match="Did you mean num_beams"):
        Captioner.from_pretrained(str(tiny_smallcap), num_beam=1)


@pytest.mark.parametrize("gpu_is_there", [False, True])
def test_by_default_the_model_goes_to_a_gpu_if_there_is_one(
    gpu_is_there: bool, tiny_smallcap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_is_there)
    monkeypatch.setattr(
        "smallcap.captioner.load_checkpoint",
        lambda model, device, dtype, cache_dir: (asked.append(device), load_checkpoint(model, "cpu", dtype))[1],
    )
    for options in ({}, {"device": "auto"}, {"device": "cpu"}):
        Captioner.from_pretrained(str(tiny_smallcap), k=0, dtype="float32", **options)
    assert asked == ["cuda" if gpu_is_there else "cpu"] * 2 + ["cpu"]


def overlapped(captioner: Captioner, batches: Sequence[Any]) -> Iterator[CaptionedBatch]:
    """Captions batches as on a GPU."""
    return captioner._beside.prepare_ahead(batches, captioner._prepare, captioner.finish)


def test_batches_that_are_prepared_beside_each_other_are_those_alone(captioner: Captioner) -> None:
    """What a GPU does on two streams, on a CPU in two threads."""
    crops = [captioner.crop_plan.crop(jpeg(seed)) for seed in range(5)]
    batches = [(crops[:2], None), ([], None), (crops[2:], ["photo-1.jpg", None, None])]
    assert [columns.to_results() for columns in overlapped(captioner, batches)] == [
        captioner.caption_batch(*batch) for batch in batches
    ]
    assert list(captioner.caption_batches(batches)) == [captioner.caption_batch(*batch) for batch in batches]


def test_one_thread_prepares_the_batches_of_all_calls(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = [captioner.crop_plan.crop(jpeg(seed)) for seed in range(6)]
    calls = [[([crops[0]], None), ([crops[1]], None)], [([crops[2]], None), (crops[3:], None)]]
    expected = [[captioner.caption_batch(*batch) for batch in call] for call in calls]
    encode, threads = Captioner.encode, []

    def noted(self: Captioner, pixels: Sequence[Pixels]) -> tuple[torch.Tensor, torch.Tensor]:
        threads.append(threading.get_ident())
        return encode(self, pixels)

    monkeypatch.setattr(Captioner, "encode", noted)

    def caption(call: Any) -> list[list[CaptionResult]]:
        return [columns.to_results() for columns in overlapped(captioner, call)]

    with ThreadPoolExecutor(2) as pool:  # an actor on a GPU has two calls at a time
        assert list(pool.map(caption, calls)) == expected
    assert [caption(call) for call in calls] == expected
    assert len(threads) == 8 and len(set(threads)) == 1 and threading.get_ident() not in threads


def _texts(results: Sequence[CaptionResult]) -> list[tuple[str | None, list[str]]]:
    return [(result.caption, [neighbour.text for neighbour in result.neighbours]) for result in results]


def test_a_batch_too_large_to_prepare_goes_on_in_halves(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = [captioner.crop_plan.crop(jpeg(seed)) for seed in range(7)]
    batches = [(crops, ["photo-1.jpg", *[None] * 6]), (crops[:4], None)]
    expected = [_texts(captioner.caption_batch(*batch)) for batch in batches]
    encode, sizes, freed = captioner.encode, [], []

    def encode_few(pixels: Sequence[Pixels]) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(pixels)

    monkeypatch.setattr(captioner, "encode", encode_few)
    monkeypatch.setattr(captioner.model, "free_memory", lambda: freed.append(captioner._generating._is_owned()))
    monkeypatch.setattr(captioner._preparing, "limit", None)
    assert [_texts(columns.to_results()) for columns in overlapped(captioner, batches)] == expected
    assert freed == [True, True]  # never beside a generation
    sizes.clear()
    list(overlapped(captioner, batches))
    assert max(sizes) <= 2  # it remembers
    monkeypatch.setattr(captioner, "encode", lambda pixels: pytest.fail("broken"))
    with pytest.raises(pytest.fail.Exception, match="broken"):
        list(overlapped(captioner, batches))


def test_sampling_takes_the_keys_that_loading_has_computed(index: str, tiny_smallcap: Path) -> None:
    sampler = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32", do_sample=True, seed=3)
    pixels = [sampler.crop_plan.crop(jpeg(seed)) for seed in range(3)]
    hashed = [replace(image, key=image.content_key) for image in pixels]
    assert sampler.caption_batch(hashed) == sampler.caption_batch(pixels)
    others = [replace(image, key=image.content_key + 1) for image in pixels]
    assert sampler.caption_batch(others) != sampler.caption_batch(pixels)


def test_a_length_penalty_does_not_change_what_logprob_means(index: str, tiny_smallcap: Path) -> None:
    options = CaptionerOptions(num_beams=1, dtype="float32")
    (greedy,), (normed,) = (
        Captioner.from_pretrained(str(tiny_smallcap), index, options, length_penalty=penalty).caption([jpeg(1)])
        for penalty in (0.0, 1.0)
    )
    assert normed.caption == greedy.caption
    assert normed.logprob == pytest.approx(greedy.logprob, rel=1e-4)
