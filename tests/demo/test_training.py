"""What the training scripts feed their models."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from demo.cross_attention_data import Examples, TrainingScenes, retrieve_others
from demo.cross_attention_start import Whitening, cross_attentions, start_at_nouns
from demo.data import object_table, region_masks
from demo.datastore import datastore_rows
from demo.tokenizer import train_tokenizer
from demo.train_language_model import IGNORED, Documents, document_batches, pad_documents
from demo.world import TRAINING, WEB, load_kinds, named_kinds, sample_scene, scenes_of
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint, tokenizer_source
from smallcap.model.prompt import encode_texts, load_tokenizer


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


class _TextIsItsRow:
    """Embeds the dump's captions as one-hot rows, so that a query picks the captions it wants."""

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.eye(len(texts), dtype=np.float32)


def test_an_images_own_captions_are_not_retrieved_for_it(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    rows = datastore_rows()[:12]
    monkeypatch.setattr("demo.cross_attention_data.datastore_rows", lambda: rows)
    query = np.zeros((1, 12), np.float32)
    query[0, [0, 1, 7, 5]] = [4, 3, 2, 1]  # rows 0 and 1 are captions of the first training scene
    assert retrieve_others(_TextIsItsRow(), query, count=2) == [[rows[7][1], rows[5][1]]]  # type: ignore[arg-type]


def test_prompts_hold_the_candidates_that_the_mode_chooses() -> None:
    model, tokenizer = load_checkpoint("demo"), load_tokenizer(tokenizer_source("demo"))
    kinds = load_kinds()
    candidates = [[f"a {kind.noun}" for kind in kinds[row : row + 60]] for row in range(20)]
    for mode, allowed in (("top-k", 4), ("sample-k", 50)):
        scenes = TrainingScenes(torch.zeros(20, 1, 1), [[[7, 8]]] * 20, candidates, mode)  # type: ignore[arg-type]
        seen: set[int] = set()
        for rows, examples in Examples(model, tokenizer, scenes, random.Random(0)).prompted(6, 5):
            for row, (ids, labels) in zip(rows, examples, strict=True):
                assert ids[-2:] == [7, 8] and labels[-3:] == [7, 8, model.config.eos_token_id]
                named = named_kinds(tokenizer.decode(ids[:-2]))
                assert len(named) == 4
                seen |= {candidates[row].index(f"a {noun}") for noun in named}
        assert (seen == set(range(4))) if mode == "top-k" else (max(seen) > 20)
        assert max(seen) < allowed


def test_plain_prompts_hold_no_captions() -> None:
    model, tokenizer = load_checkpoint("demo"), load_tokenizer(tokenizer_source("demo"))
    scenes = TrainingScenes(torch.zeros(3, 1, 1), [[[7, 8]]] * 3, [["a dog"]] * 3, "top-k")
    for _, examples in Examples(model, tokenizer, scenes, random.Random(0)).plain(2, 4):
        assert [tokenizer.decode(ids[:-2]) for ids, _ in examples] == ["This image shows "] * 4


@pytest.mark.parametrize("reduce_factor", [1, 4])
def test_values_start_near_the_nouns_of_their_patches(reduce_factor: int) -> None:
    torch.manual_seed(0)
    config = load_checkpoint("demo").config
    decoder = dataclasses.replace(config.decoder, cross_attention_reduce_factor=reduce_factor)
    model = SmallCapModel(dataclasses.replace(config, decoder=decoder))
    tokenizer = load_tokenizer(tokenizer_source("demo"))
    nouns = [ids[0] for ids in encode_texts(tokenizer, [f" {kind.noun}" for kind in load_kinds()])]
    scenes = [scene for scene in scenes_of(TRAINING, 400) if len(scene.objects) == 1]
    kinds, _ = object_table(scenes)
    of_kind = torch.randn(len(nouns), 128)
    features = of_kind[kinds[:, 0]][:, None].expand(-1, 1 + 36, -1) + 0.1 * torch.randn(len(scenes), 37, 128)
    start_at_nouns(model, features, scenes, nouns, scale=1.0)
    attention = cross_attentions(model)[-1]
    values = attention.c_attn(features[:, 18])[:, -attention.c_proj.weight.shape[0] :]
    read = attention.c_proj(values) @ model.decoder.token_embedding[nouns].T
    known = kinds[:, 0].unique()
    right = known[read[:, known].argmax(1)] == kinds[:, 0]
    assert right.float().mean() > (0.9 if reduce_factor == 1 else 0.3)  # of about 140 kinds


def test_whitened_features_have_unit_spread_and_fold_into_the_weights() -> None:
    model = load_checkpoint("demo")
    attention = cross_attentions(model)[-1]
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
