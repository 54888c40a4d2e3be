"""Makes the golden output of a captioning run, `run_v1/`; run once, and again only for a run_v2 beside it.

The rows are those of a run of the demo model. It writes to a folder that does not exist yet. From a checkout's root:

    python tests/golden/make_run_v1.py NEW-FOLDER
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.captioning.record import Attempt, ImageCounts, Input, RunRecord, write_run_record
from smallcap import storage
from smallcap.config import CaptionConfig, GenerationConfig, OutputConfig
from smallcap.evaluation.shared_words import measure_shared_words
from smallcap.images.listing import make_work_list
from smallcap.images.row_ranges import RowRanges
from smallcap.output.part_files import PartInfo, PartOptions, write_part
from smallcap.output.schema import FRAGMENT, FRAGMENT_ROW, PLACE_COLUMNS, caption_schema

DIM = 16
KEPT = {"split": ["test", "train", "train"], "licence": [4, 4, 4]}
IDS = ["10000000.jpg", "10000001.jpg", "broken.jpg"]
URIS = [f"s3://golden/images/{image_id}" for image_id in IDS]
INFO = PartInfo({0: RowRanges([(0, 3)])}, {0: RowRanges([(2, 3)])}, (0,), 2, {"not_an_image": 1})
PINNED = {"run_id": "9156e9610be6", "model_id": "demo@e2a6d95a4e14", "index_id": "1adeb9c10471b38c"}
VERSIONS = {"python": "3.11.7", "smallcap": "0.1.0", "torch": "2.15.0", "transformers": "5.23.0"}
SOURCES = ["captions.csv"]
CAPTIONED: list[dict[str, Any]] = [
    {
        "caption": "a rocket and a dog above a tractor on a yellow background",
        "caption_logprob": -2.9112434,
        "caption_tokens": 13,
        "clip_score": 0.84987676,
        "alternatives": [
            {"caption": "a rocket and a dog above a tractor on a yellow ground", "logprob": -2.921566, "tokens": 13}
        ],
        "neighbours": [
            {
                "caption_id": 25,
                "text": "a house and a train on a yellow background",
                "score": 0.6890859,
                "sources": SOURCES,
            },
            {"caption_id": 1771, "text": "a chair and a tractor above a lion", "score": 0.6762134, "sources": SOURCES},
            {
                "caption_id": 2687,
                "text": "a snail above a football and a panda on a yellow ground",
                "score": 0.67356414,
                "sources": SOURCES,
            },
            {"caption_id": 2422, "text": "a clock, an avocado and a tractor", "score": 0.6579065, "sources": SOURCES},
        ],
    },
    {
        "caption": "just a large chair on a yellow ground",
        "caption_logprob": -2.7997866,
        "caption_tokens": 9,
        "clip_score": 0.8475543,
        "alternatives": [{"caption": "just a large chair on a yellow background", "logprob": -2.8760242, "tokens": 9}],
        "neighbours": [
            {"caption_id": 2183, "text": "there is a large chair", "score": 0.8120338, "sources": SOURCES},
            {"caption_id": 1167, "text": "just a chair", "score": 0.80096096, "sources": SOURCES},
            {"caption_id": 673, "text": "a chair", "score": 0.77803457, "sources": SOURCES},
            {"caption_id": 61, "text": "just a large chair on green", "score": 0.7685974, "sources": SOURCES},
        ],
    },
]
BROKEN = {
    "status": "error",
    "error_code": "not_an_image",
    "error_message": f"The bytes are not those of a known image format.\n  where: {URIS[2]}",
}


def main() -> None:
    """Writes the list of work, a part of two captioned images and an error, its sidecars, and the record."""
    out = Path(sys.argv[1]).absolute()
    out.mkdir()  # fails where there is something
    with storage.scratch_folder() as folder:
        os.chdir(folder)  # the list of work names its sources as they are given
        columns = {"image_id": IDS, "image_uri": URIS, "split": KEPT["split"]}
        licence = pa.array(KEPT["licence"], pa.int32())
        pq.write_table(pa.table(columns).append_column("licence", licence), "images.parquet")
        config = CaptionConfig(
            images=("images.parquet",),
            keep_columns=tuple(KEPT),
            index="out/demo/index",
            model="demo",
            out="golden_run",
            generation=GenerationConfig(num_captions=2),
            output=OutputConfig(save_embeddings=True, write=("webdataset",)),
        )
        work = make_work_list(config.images, config.input, str(out), config.keep_columns)
    schema = caption_schema(**PINNED, kept_columns=work.kept_columns)
    sidecars = [
        pa.field("embedding", pa.list_(pa.float32(), DIM)),
        pa.field("image_bytes", pa.binary()),
        *(pa.field(name, pa.int32()) for name in PLACE_COLUMNS),
    ]
    rows = [_row(number, CAPTIONED[number] | _sidecars(number)) for number in (0, 1)] + [_row(2, BROKEN)]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*schema, *sidecars]))
    options = PartOptions(rows_per_row_group=1000, embeddings=True, webdataset=True)
    write_part(str(out), "part-001-000000.parquet", table, INFO, schema, options)
    record = RunRecord(
        **PINNED,
        status="complete",
        config=config.model_dump(mode="json"),
        retrieval_encoder="demo",
        versions=VERSIONS,
        input=Input.of(work),
        images=ImageCounts.of([INFO]),
        attempts=(_attempt(),),
    )
    write_run_record(str(out), record)


def _row(number: int, values: dict[str, Any]) -> dict[str, Any]:
    common = {"image_id": IDS[number], "image_uri": URIS[number], "status": "ok", FRAGMENT: 0, FRAGMENT_ROW: number}
    return common | {name: column[number] for name, column in KEPT.items()} | values | _scores(values)


def _scores(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that follow from others; none for an error."""
    neighbours = values.get("neighbours")
    if neighbours is None:
        return {}
    shared = measure_shared_words(pa.array([values["caption"]]), pa.array([neighbours]))
    return {
        "copied_share": shared.copied_share[0].as_py(),
        "neighbour_agreement": shared.neighbour_agreement[0].as_py(),
        "retrieval_score": np.mean([neighbour["score"] for neighbour in neighbours], dtype=np.float32),
        "best_caption": values["caption"],
    }


def _sidecars(number: int) -> dict[str, Any]:
    image = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, 80, 160)).save(image, "JPEG")
    vector = np.random.default_rng(number).normal(size=DIM)
    embedding = (vector / np.linalg.norm(vector)).astype(np.float32)
    return {"width": 8, "height": 6, "embedding": embedding, "image_bytes": image.getvalue()}


def _attempt() -> Attempt:
    return Attempt(
        token="b2d61b766f284342a2129cd65eae844c",
        started_at="2026-11-25T19:06:06+00:00",
        finished_at="2026-11-25T19:06:29+00:00",
        images=3,
        seconds=23.287,
        decode_s=3.582,
        fetch_s=2.176,
        fetch_retries=0,
        caption_s=0.083,
        write_s=0.011,
        actors=1,
        device="cpu",
        dtype="float32",
        search_backends=("cpu",),
    )


if __name__ == "__main__":
    main()
