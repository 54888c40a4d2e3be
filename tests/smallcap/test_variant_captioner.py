"""Several ways to caption give what each gives alone, and encode and search once."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.tiny_models import make_tiny_smallcap
from smallcap.captioned import CaptionResult
from smallcap.captioner import Captioner, CaptionerOptions
from smallcap.model.checkpoint import load_checkpoint, save_checkpoint, share_vision_encoder
from smallcap.variant_captioner import VariantCaptioner
from tests.caption_runs import jpeg
from tests.index_files import build_text_index

OWN: list[dict[str, Any]] = [
    {},
    {"k": 2, "num_beams": 1},
    {"k": 0, "num_captions": 2},
    {"template": "Such images:\n\n||\n\nA caption: "},
    {"do_sample": True, "seed": 3},
    {"rerank": True, "num_beams": 4},
]


@pytest.fixture(scope="module")
def index(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [f"{n}.jpg,{n} {noun} on a road" for n in range(4) for noun in ("dog", "bus", "cat")]
    return build_text_index(tmp_path_factory.mktemp("variants"), tiny_clip, rows)


@pytest.fixture(scope="module")
def other_decoder(tiny_smallcap: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with the vision encoder of `tiny_smallcap`, and another decoder."""
    folder = tmp_path_factory.mktemp("other-decoder")
    shutil.copytree(tiny_smallcap, folder, dirs_exist_ok=True)
    model = load_checkpoint(str(tiny_smallcap))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_checkpoint(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def other_encoder(other_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("other-encoder")
    make_tiny_smallcap(folder, other_clip)
    return str(folder)


def test_each_way_gives_what_it_gives_alone(
    index: str, tiny_clip: Path, tiny_smallcap: Path, other_decoder: str, other_encoder: str, monkeypatch: Any
) -> None:
    model, encoder = str(tiny_smallcap), f"hf:{tiny_clip}"
    ways = [(model, own) for own in OWN] + [(other_decoder, {}), (other_encoder, {"k": 3})]
    options = [CaptionerOptions(dtype="float32", retrieval_encoder=encoder, **own) for _, own in ways]
    together = VariantCaptioner.from_pretrained([(way[0], one) for way, one in zip(ways, options, strict=True)], index)
    first, *_, same_encoder, another = together.captioners
    assert len({id(one.model) for one in together.captioners}) == 3
    assert same_encoder.model.encoder is first.model.encoder
    assert another.model.encoder is not first.model.encoder
    pixels = [first.crop_plan.crop(jpeg(seed)) for seed in range(5)]
    ids = [f"{number}.jpg" for number in range(5)]
    batches = [(pixels[:3], ids[:3]), (pixels[3:], ids[3:])]
    encoded: list[int] = []
    encode = Captioner.encode
    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "encode", lambda self, images: encoded.append(len(images)) or encode(self, images))
        columns = list(together.caption_columns(batches, range(len(ways))))
    assert encoded == [3, 3, 2, 2]  # two vision encoders
    for way, (source, own) in enumerate(ways):
        alone = Captioner.from_pretrained(source, index, dtype="float32", retrieval_encoder=encoder, **own)
        expected = [result for batch in batches for result in alone.caption_batch(*batch)]
        found = [result for of_batch in columns for result in of_batch[way].to_results()]
        assert list(map(comparable, found)) == list(map(comparable, expected)), own
    ahead = together._beside.prepare_ahead(
        batches, partial(together._prepare, [0, 7]), partial(together._finish, [0, 7])
    )  # as on a GPU
    for found, expected in zip(ahead, columns, strict=True):
        for one, way in zip(found, (0, 7), strict=True):
            assert list(map(comparable, one.to_results())) == list(map(comparable, expected[way].to_results()))
    (some,) = together.caption_columns(batches[:1], [2, 6])
    assert [list(map(comparable, one.to_results())) for one in some] == [
        list(map(comparable, columns[0][way].to_results())) for way in (2, 6)
    ]


def comparable(result: CaptionResult) -> tuple[Any, ...]:
    return (
        result.caption,
        result.num_tokens,
        [one.caption for one in result.alternatives],
        [one.caption_id for one in result.neighbours],
        None if result.clip_score is None else round(result.clip_score, 3),
        None if result.embedding is None else np.round(result.embedding, 3).tolist(),
    )


def test_vision_encoders_are_compared_by_their_files(
    tiny_smallcap: Path, other_decoder: str, other_encoder: str
) -> None:
    assert share_vision_encoder(str(tiny_smallcap), other_decoder)
    assert not share_vision_encoder(str(tiny_smallcap), other_encoder)
