"""What an evaluation takes from rows: nothing is lost without being counted."""

import math
from typing import Any

import pyarrow as pa
import pytest

from smallcap.errors import SchemaError
from smallcap.evaluation.references import ReferenceImage, References
from smallcap.evaluation.run_captions import COLUMNS, collect_run
from smallcap.output.schema import CAPTION_COLUMNS

TEXTS = {"a.jpg": "a wet dog", "b.jpg": "a red car", "c.jpg": "nobody captioned it"}
REFERENCES = References((ReferenceImage(name, (text,)) for name, text in TEXTS.items()), "refs")


def rows(*given: dict[str, Any]) -> list[pa.Table]:
    empty = dict.fromkeys(COLUMNS) | {"status": "ok"}
    schema = pa.schema([CAPTION_COLUMNS.field(name) for name in COLUMNS])
    return [pa.Table.from_pylist([empty | row], schema) for row in given]


def test_rows_are_captions_errors_or_without_references() -> None:
    near = [{"caption_id": number, "text": text, "score": 0.5} for number, text in enumerate(["a dog", "wet sand"])]
    given = rows(
        {"image_id": "x/a.jpg", "caption": "A dog.", "neighbours": near, "clip_score": 0.25, "copied_share": 0.75},
        {"image_id": "b.jpg", "status": "error", "error_code": "truncated"},
        {"image_id": "z.jpg", "caption": "a bus"},
    )
    run = collect_run(given, REFERENCES, "run")
    assert run.captions == {"a.jpg": "A dog."}
    assert (run.rows, run.errors, run.unmatched, run.examples) == (3, {"truncated": 1}, 1, ["z.jpg"])
    assert run.values == {"a.jpg": pytest.approx((0.25, 1, 0.75, 1, 2, math.nan), nan_ok=True)}  # "a dog" was copied


def test_a_run_without_retrieval_has_no_figures_of_it() -> None:
    given = rows({"image_id": "a.jpg", "caption": "a dog", "neighbours": [], "caption_tokens": 4})
    run = collect_run(given, REFERENCES, "")
    assert run.values["a.jpg"] == pytest.approx((math.nan, math.nan, math.nan, math.nan, 2, 4), nan_ok=True)
    assert run.column("tokens", ["a.jpg"]).tolist() == [4]


def test_two_images_that_mean_one_are_refused() -> None:
    twice = rows({"image_id": "a.jpg", "caption": "a dog"}, {"image_id": "a.png", "caption": "a cat"})
    with pytest.raises(SchemaError) as error:
        collect_run(twice, REFERENCES, "s3://run")
    assert error.value.where == "s3://run: a.jpg and a.png"
