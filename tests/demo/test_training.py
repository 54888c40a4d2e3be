"""What the training scripts feed their models."""

import random

import numpy as np
import torch

from demo.data import object_table, region_masks
from demo.datastore import datastore_rows
from demo.tokenizer import train_tokenizer
from demo.train_cross_attention import Whitening, retrieve_others
from demo.train_language_model import IGNORED, Documents, pad_documents
from demo.world import load_kinds, sample_scene


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
    tokenizer = train_tokenizer(range(200))
    documents = Documents([sample_scene(seed) for seed in range(200)], 4, tokenizer)
    rng = random.Random(0)
    drawn = [documents.draw(rng) for _ in range(20)]
    ids, labels = pad_documents(drawn)
    for row, document in enumerate(drawn):
        assert document[-1] == 13
        assert labels[row, len(document) :].eq(IGNORED).all()
        assert ids[row, : len(document)].tolist() == document == labels[row, : len(document)].tolist()


class _TextIsItsRow:
    """Embeds the dump's captions as one-hot rows, so that a query picks the captions it wants."""

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.eye(len(texts), dtype=np.float32)


def test_an_images_own_captions_are_not_retrieved_for_it(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    rows = datastore_rows()[:12]
    monkeypatch.setattr("demo.train_cross_attention.datastore_rows", lambda: rows)
    query = np.zeros((1, 12), np.float32)
    query[0, [0, 1, 7, 5]] = [4, 3, 2, 1]  # rows 0 and 1 are captions of the first training scene
    assert retrieve_others(_TextIsItsRow(), query, k=2) == [[rows[7][1], rows[5][1]]]  # type: ignore[arg-type]


def test_whitened_features_have_unit_spread_and_fold_into_the_weights() -> None:
    from smallcap.checkpoint import load_checkpoint

    model = load_checkpoint("demo")
    attention = model.decoder.transformer.h[-1].crossattention  # type: ignore[union-attr]
    size = attention.c_attn.weight.shape[0]
    features = torch.randn(50, 65, size) * torch.logspace(-1, 1, size) + 3
    whitening = Whitening.of(features)
    whitened = whitening.apply(features).float()
    assert torch.allclose(whitened.flatten(0, 1).mean(0), torch.zeros(size), atol=0.05)
    assert whitened.flatten(0, 1).std(0).median() > 0.9
    on_whitened = attention.c_attn(whitened)
    whitening.fold_into(model)
    folded = attention.c_attn(features)
    assert (folded - on_whitened).abs().mean() < 0.02 * on_whitened.abs().mean()
