"""Tables of captions hold what the captioner returns for each image, and crops are not copied on their way to it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.bench import loaded_table
from jobs.captioning.caption_table import TableCaptioner, pixels_of
from jobs.captioning.load import CONTENT_KEY, VISION_PIXELS
from smallcap.captioned import ScoredCaptions
from smallcap.captioner import Captioner, CaptionResult
from smallcap.images.crops import Pixels
from smallcap.output.schema import CAPTION_COLUMNS, EMBEDDING_COLUMN, ENDS_FRAGMENT, FRAGMENT, FRAGMENT_ROW
from tests.caption_runs import jpeg

FAILED = (0, 4)  # rows
OPTIONS = {"retrieval": {"num_captions": 3}, "without": {"k": 0, "clip_score": False}}


@pytest.fixture(scope="module", params=OPTIONS)
def captioner(request: pytest.FixtureRequest, index: str, tiny_smallcap: Path) -> Captioner:
    return Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32", **OPTIONS[request.param])


def images(captioner: Captioner, count: int = 7) -> list[Pixels]:
    return [captioner.crop_plan.crop(jpeg(seed)) for seed in range(count)]


def loaded(pixels: Sequence[Pixels]) -> pa.Table:
    """Returns a table in three chunks, two of whose rows failed, and in which a column of the input was kept."""
    table = pa.concat_tables([loaded_table(pixels[:3]), loaded_table(pixels[3:5]), loaded_table(pixels[5:])])
    failed = [row in FAILED for row in range(len(table))]
    changes = {
        "image_id": [f"{row}.jpg" for row in range(len(table))],
        "status": ["error" if one else "ok" for one in failed],
        "error_code": ["not_an_image" if one else None for one in failed],
    }
    for name, values in changes.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
    return table.append_column("kept", pa.array(range(len(table)), pa.int16()))


def row_of(result: CaptionResult | None, embeds: bool) -> dict[str, Any]:
    """Returns what captioning adds to a row, said once more and without columns."""
    result, failed = result or CaptionResult(), result is None
    row = {
        "width": result.width,
        "height": result.height,
        "caption": result.caption,
        "caption_logprob": result.logprob,
        "caption_tokens": result.num_tokens,
        "clip_score": result.clip_score,
        "alternatives": None
        if failed
        else [{"caption": a.caption, "logprob": a.logprob, "tokens": a.num_tokens} for a in result.alternatives],
        "neighbours": None if failed else [vars(neighbour) for neighbour in result.neighbours],
        "retrieval_score": np.mean([one.score for one in result.neighbours]).item() if result.neighbours else None,
        "alt_clip_score": None,
        "best_caption": result.caption,
    }
    if embeds:
        row[EMBEDDING_COLUMN] = result.embedding
    return row


@pytest.mark.parametrize("embeds", [True, False])
def test_a_table_holds_each_images_result(captioner: Captioner, embeds: bool) -> None:
    pixels = images(captioner)
    good = [row for row in range(7) if row not in FAILED]
    results = captioner.caption_batch([pixels[row] for row in good], [f"{row}.jpg" for row in good])
    expected = [row_of(dict(zip(good, results, strict=True)).get(row), embeds) for row in range(7)]
    batch = loaded(pixels)
    table, captioned = TableCaptioner(captioner, 2, exclude_own=True, embeds=embeds)(batch)
    assert len(captioned) == 5
    added = pa.schema([*(CAPTION_COLUMNS.field(name) for name in expected[0] if name != EMBEDDING_COLUMN)])
    if embeds:
        added = added.append(pa.field(EMBEDDING_COLUMN, pa.list_(pa.float32())))
    assert table.select(added.names).schema == added
    wanted, found = pa.Table.from_pylist(expected, added).to_pylist(), table.select(added.names).to_pylist()
    for one, other in zip(wanted, found, strict=True):  # the batches differ, and with them the last digits
        for name, value in one.items():
            assert other[name] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else _near(value)), name
    kept = ["image_id", "image_uri", "status", "error_code", "error_message", FRAGMENT, FRAGMENT_ROW, ENDS_FRAGMENT]
    assert table.select([*kept, "kept"]).equals(batch.select([*kept, "kept"]))
    assert VISION_PIXELS not in table.column_names


def _near(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if value and not isinstance(value[0], dict):
        return pytest.approx(value, abs=1e-2)
    return [
        {name: pytest.approx(x, abs=1e-3) if isinstance(x, float) else x for name, x in entry.items()}
        for entry in value
    ]


def test_a_given_text_is_scored_and_is_best_where_it_fits_better(
    index: str, tiny_smallcap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner.from_pretrained(str(tiny_smallcap), index, dtype="float32")
    encoder, batch = captioner.retrieval_encoder, loaded(images(captioner))
    assert encoder is not None
    texts = ["not loaded", "a dog", None, " ", "not loaded", "two cats on a sofa", "a dog"]
    batch = batch.append_column("alt", pa.array(texts, pa.large_string()))
    decode = captioner.detokenise

    def with_empty(generated: Any) -> ScoredCaptions:
        captions = decode(generated)
        return replace(captions, texts=["" if text == captions.texts[0] else text for text in captions.texts])

    monkeypatch.setattr(captioner, "detokenise", with_empty)
    captioner.generation = replace(captioner.generation, num_beams=1)  # an empty caption stays empty
    table, captioned = TableCaptioner(captioner, 2, exclude_own=False, embeds=False, score_column="alt")(batch)
    rows = table.to_pylist()
    assert captioned.embeddings is not None
    embeddings = dict(zip((1, 2, 3, 5, 6), captioned.embeddings, strict=True))
    assert {row["alt"] for row in rows} == set(texts)
    assert "" in captioned.captions.texts
    for number, row in enumerate(rows):
        if number not in (1, 5, 6):
            assert row["alt_clip_score"] is None
            assert row["best_caption"] == (row["caption"] or None)
            continue
        cosine = float(embeddings[number] @ encoder.encode_texts([texts[number] or ""])[0])
        assert row["alt_clip_score"] == pytest.approx(cosine, abs=1e-4)
        is_better = row["alt_clip_score"] > row["clip_score"] or not row["caption"]
        assert row["best_caption"] == (row["alt"] if is_better else row["caption"])


def test_a_table_in_which_nothing_could_be_loaded_has_nulls(captioner: Captioner) -> None:
    batch = loaded(images(captioner)).take([0, 4])
    table, captioned = TableCaptioner(captioner, 2, exclude_own=False, embeds=True)(batch)
    assert len(captioned) == 0
    assert (
        table.select(["caption", "neighbours", "width", EMBEDDING_COLUMN]).to_pylist()
        == [{"caption": None, "neighbours": None, "width": None, EMBEDDING_COLUMN: None}] * 2
    )


def test_several_threads_caption_tables_at_once(captioner: Captioner) -> None:
    caption = TableCaptioner(captioner, 3, exclude_own=False, embeds=False)
    batch = loaded(images(captioner))
    expected, _ = caption(batch)
    with ThreadPoolExecutor(2) as threads:
        assert all(table.equals(expected) for table, _ in threads.map(caption, [batch] * 4))


def test_crops_are_views_into_the_table_and_bring_their_keys() -> None:
    crops = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    tables = [loaded_table([Pixels(crop, None, 8, 9) for crop in part]) for part in (crops[:2], crops[2:])]
    table = pa.concat_tables(tables)
    chunks = [chunk.to_numpy_ndarray() for chunk in table[VISION_PIXELS].chunks]
    pixels = pixels_of(table, [0, 3])
    assert all(np.shares_memory(image.vision, chunk) for image, chunk in zip(pixels, chunks, strict=True))
    assert [image.vision.tolist() for image in pixels] == crops[[0, 3]].tolist()
    assert pixels[0].content_key == Pixels(crops[0], None, 8, 9).content_key
    keyed = table.append_column(CONTENT_KEY, pa.array(range(5), pa.int64()))
    assert [image.content_key for image in pixels_of(keyed, [0, 3])] == [0, 3]
