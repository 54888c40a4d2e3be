"""Makes the golden output of schema version 3; run once, and again only for a run_v4 beside it.

It writes to a folder that does not exist yet and never over `run_v3/`. From a checkout's root:

    python tests/golden/make_run_v3.py NEW-FOLDER
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from smallcap.images.row_ranges import RowRanges
from smallcap.output.part_files import PartInfo, PartOptions, write_part
from smallcap.output.schema import caption_schema

DIM = 16
KEPT = pa.schema([("split", pa.string()), ("licence", pa.int32())])


def main() -> None:
    """Writes a part of two captioned images and an error, an embeddings file and a tar."""
    out = Path(sys.argv[1])
    out.mkdir()  # fails where there is something
    schema = caption_schema("0123456789ab", "demo@e2a6d95a4e14", "23bf30dae023154c", 3, KEPT)
    sidecars = [pa.field("embedding", pa.list_(pa.float16(), DIM)), pa.field("image_bytes", pa.binary())]
    rows = [
        _captioned("10000001.jpg", "two dogs on a beach", "train"),
        _captioned("10000000.jpg", "a rocket above a tractor", "test"),
        {
            **_common("broken.jpg", "train"),
            "status": "error",
            "error_code": "not_an_image",
            "error_message": "The bytes are not those of a known image format.\n  where: s3://golden/images/broken.jpg",
        },
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*schema, *sidecars]))
    info = PartInfo(
        {4: RowRanges([(254, 256)]), 5: RowRanges([(0, 1)])}, {5: RowRanges([(0, 1)])}, (4,), 2, {"not_an_image": 1}
    )
    options = PartOptions(rows_per_row_group=1000, embeddings=True, webdataset=True)
    write_part(str(out), "part-000-000000.parquet", table, info, schema, options)


def _common(image_id: str, split: str) -> dict[str, object]:
    return {"image_id": image_id, "image_uri": f"s3://golden/images/{image_id}", "split": split, "licence": 4}


def _captioned(image_id: str, caption: str, split: str) -> dict[str, object]:
    number = int(image_id.removesuffix(".jpg"))
    image = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, 80, 160)).save(image, "JPEG")
    vector = np.random.default_rng(number).normal(size=DIM)
    return {
        **_common(image_id, split),
        "width": 8,
        "height": 6,
        "caption": caption,
        "caption_logprob": -2.25,
        "caption_tokens": len(caption.split()) + 1,
        "clip_score": 0.75,
        "alternatives": [{"caption": f"{caption} at noon", "logprob": -3.5, "tokens": len(caption.split()) + 3}],
        "neighbours": [{"caption_id": 25, "text": "a train on a yellow ground", "score": 0.625}],
        "status": "ok",
        "embedding": (vector / np.linalg.norm(vector)).astype(np.float16),
        "image_bytes": image.getvalue(),
    }


if __name__ == "__main__":
    main()
