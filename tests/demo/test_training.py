"""What the training scripts feed their models."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from demo.data import object_table, region_masks
from demo.datastore import datastore_rows
from demo.render import encode_jpeg, find_font
from demo.tokenizer import train_tokenizer
from demo.train_clip import CAPTIONS_ALONE, DOMAINS_TOGETHER, caption_loss, draw_batch
from demo.train_cross_attention import CAPTIONS_PER_SCENE, training_config, write_training_scenes
from demo.train_language_model import IGNORED, Documents, document_batches, pad_documents
from demo.training import Recipe, descend
from demo.world import HELD_OUT_DOMAINS, TRAINING, WEB, load_kinds, named_kinds, sample_scene, scenes_of


def test_region_masks_average_the_patches_in_the_middle_of_an_object() -> None:
    places = torch.tensor([[[0.25, 0.75, 0.5], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0]]])
    masks = region_masks(places, grid=8).view(3, 8, 8)
    rows, columns = torch.nonzero(masks[0], as_tuple=True)
    assert rows.min() >= 4 and columns.max() <= 3  # lower left: y grows downwards
    assert torch.allclose(masks.flatten(1).sum(1), torch.ones(3))
    assert (masks[1] > 0).sum() == 4  # a small object still has the patches around its centre


def test_object_table_lists_kinds_and_ignores_absent_objects() -> None:
    scenes = [sample_scene(seed) for seed in range(20)]
    kinds, places = object_table(scenes)
    for row, scene in enumerate(scenes):
        present = [load_kinds()[i].noun for i in kinds[row].tolist() if i >= 0]
        assert present == [placed.kind.noun for placed in scene.objects]
        assert places[row, 0].tolist() == [
            torch.tensor(value).item() for value in (scene.objects[0].x, scene.objects[0].y, scene.objects[0].scale)
        ]


def test_documents_end_with_eos_and_padding_is_not_learnt() -> None:
    tokenizer = train_tokenizer(200)
    documents = Documents(scenes_of(WEB, 200), 4, tokenizer)
    rng = random.Random(0)
    drawn = [documents.draw(rng) for _ in range(20)]
    ids, labels = pad_documents(drawn)
    for row, document in enumerate(drawn):
        assert document[-1] == 13
        assert labels[row, len(document) :].eq(IGNORED).all()
        assert ids[row, : len(document)].tolist() == document == labels[row, : len(document)].tolist()


def test_batches_hold_documents_of_like_length() -> None:
    tokenizer = train_tokenizer(200)
    documents = Documents(scenes_of(WEB, 200), 4, tokenizer)
    batches = list(document_batches(documents, steps=20, batch_size=8, rng=random.Random(0)))
    assert [len(batch) for batch in batches] == [8] * 20
    spreads = [max(map(len, batch)) - min(map(len, batch)) for batch in batches]
    lengths = [len(document) for batch in batches for document in batch]
    assert sum(spreads) / len(spreads) < 0.25 * (max(lengths) - min(lengths))
    assert batches == list(document_batches(documents, steps=20, batch_size=8, rng=random.Random(0)))


def test_prompts_hold_the_captions_that_share_most_first() -> None:
    scenes = scenes_of(WEB, 400)
    documents, rng = Documents(scenes, 2, train_tokenizer(200)), random.Random(0)
    firsts = []
    for row, scene in enumerate(scenes[:60]):
        related = [named_kinds(caption) for caption in documents._related(row, 5, rng)]
        shared = [(kinds & scene.kinds).total() / (kinds | scene.kinds).total() for kinds in related]
        assert shared == sorted(shared, reverse=True)
        firsts.append(related[0] == scene.kinds)
    assert sum(firsts) > 50


def test_batches_of_clip_hold_few_domains() -> None:
    domains = np.array([scene.domain for scene in scenes_of(WEB, 2_000)])
    rows_of = [np.flatnonzero(domains == domain) for domain in np.unique(domains)]
    pairs = set()
    for step in range(20):
        rows, others = draw_batch(rows_of, 16, np.random.default_rng(step))
        assert (len(rows), len({*rows, *others})) == (16, 16 * (1 + CAPTIONS_ALONE))
        drawn = {*domains[rows]}
        assert len(drawn) == DOMAINS_TOGETHER and drawn == {*domains[others]}
        pairs.add(frozenset(drawn))
    assert len(pairs) > 10


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("demo.training.STEPS_PER_LINE", 4)
    recipe, file = Recipe(steps=10, warmup_steps=2), tmp_path / "checkpoint"

    def run(stop: int) -> tuple[torch.Tensor, list[int]]:
        weight, taken = torch.nn.Parameter(torch.ones(3, 2)), list[int]()

        def losses(first: int) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
            for step in range(first, stop):
                taken.append(step)
                yield (weight * torch.arange(step, step + 6.0).view(3, 2)).square().sum(), {}

        descend("model", [weight], recipe, losses, file)
        return weight.detach(), taken

    whole, _ = run(10)
    assert not file.exists()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # as if the process had ended there
    run(7)
    resumed, taken = run(10)
    assert taken == list(range(4, 10)) and torch.equal(whole, resumed)


def test_captions_of_the_same_objects_are_no_mismatches() -> None:
    objects = torch.tensor([0, 1, 0, 2])
    texts = torch.tensor([0, 1, 0, 2, 1, 3])
    matched = 20.0 * (objects[:, None] == texts)
    confused = matched.clone()
    confused[1, 5] = 40.0  # another scene's objects
    assert caption_loss(matched, objects, texts) < 0.8  # the entropy of the shared targets, which is least possible
    assert caption_loss(confused, objects, texts) > caption_loss(matched, objects, texts) + 1


@pytest.mark.skipif(find_font() is None, reason="the Noto Color Emoji font is not installed")
def test_training_scenes_are_images_with_captions_named_as_in_the_dump(tmp_path: Path) -> None:
    write_training_scenes(tmp_path, 30, workers=1)
    rows = pq.read_table(tmp_path).to_pylist()
    assert len(rows) == 30
    assert {row["image_id"] for row in rows} <= {image for image, _ in datastore_rows(TRAINING, 30)}
    for row in rows:
        scene = sample_scene(int(row["image_id"].removeprefix("training-").removesuffix(".jpg")))
        assert row["image"] == encode_jpeg(scene)
        assert len(row["caption"]) == CAPTIONS_PER_SCENE
        assert all(named_kinds(caption) == scene.kinds for caption in row["caption"])


def test_cross_attention_is_trained_by_the_job_on_the_training_domains_alone(tmp_path: Path) -> None:
    config = training_config(tmp_path, tmp_path / "out", "index", retrieval="c-sample-k")
    assert (config.vision_encoder, config.model, config.retrieval.mode) == ("demo", None, "c-sample-k")
    assert not {*TRAINING.domains} & {*HELD_OUT_DOMAINS}
    plain = training_config(tmp_path, tmp_path / "out", "index", retrieval=None)
    assert plain.retrieval.k == 0 and plain.features is None
