"""Stored features and candidates of made-up images, for tests of what reads them."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from smallcap.training.feature_store import (
    PartEntry,
    Split,
    candidate_table,
    feature_table,
    list_parts,
    part_name,
    write_part,
)


def write_store(
    folder: Path, parts: int = 3, images: int = 4, hidden_size: int = 32, split: Split = "train"
) -> tuple[PartEntry, ...]:
    """Writes `features/` and `candidates/`: images with two captions each and 60 candidates; returns the parts."""
    rng = np.random.default_rng(0)
    for part in range(parts):
        ids = [f"{part}-{image}" for image in range(images)]
        nothing = pa.nulls(images, pa.string())
        columns = {"image_id": ids, "image_uri": ids, "status": ["ok"] * images}
        rows = pa.table(columns | {"error_code": nothing, "error_message": nothing})
        captions = [[f"a dog {image_id}", f"the bus {image_id}"] for image_id in ids]
        features = rng.standard_normal((images, 5, hidden_size)).astype(np.float16)
        name = part_name(part, 0, is_last=True)
        write_part(str(folder / "features" / split / name), feature_table(rows, captions, features, None))
        near = [[{"caption_id": n, "text": f"near {n}", "score": 1.0} for n in range(60)] for _ in ids]
        write_part(str(folder / "candidates" / split / name), candidate_table(ids, near))
    return tuple(part for part in list_parts(str(folder / "features")) if part.split == split)
