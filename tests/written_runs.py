"""Parts of a captioning run that no job has written."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from smallcap.images.row_ranges import RowRanges
from smallcap.output.part_files import PartInfo, write_part
from smallcap.output.schema import CAPTION_COLUMNS, caption_schema

# The ids in a run of four parts with three captions each.
CAPTIONED = sorted(f"{part}-{row}" for part in range(4) for row in range(3))
FAILED = [f"{part}-x" for part in range(4)]


def write_run(run: Path, parts: int = 4, rows: int = 3, kept: pa.Table | None = None) -> str:
    """Writes parts of a run, in each some captions and one failed image."""
    schema = caption_schema("run", "model", "index", kept.schema if kept else None)
    for part in range(parts):
        names = [f"{part}-{row}" for row in range(rows)]
        columns: list[dict[str, Any]] = [
            {
                "image_id": name,
                "image_uri": name,
                "caption": f"café {name}",
                "caption_tokens": 7,
                "caption_logprob": -0.5,
                "neighbours": [{"caption_id": row, "text": "t", "score": 0.25}],
                "status": "ok",
            }
            for row, name in enumerate(names)
        ]
        columns.append({"image_id": f"{part}-x", "status": "error", "error_code": "empty"})
        table = pa.Table.from_pylist(columns, schema=CAPTION_COLUMNS)
        for field in kept.schema if kept else ():
            assert kept is not None
            values = pa.concat_arrays([*kept[field.name].chunks, pa.nulls(1, field.type)])
            table = table.append_column(field, values)
        places = RowRanges.of(np.arange(rows + 1))
        info = PartInfo({part: places}, {part: RowRanges.of(np.array([rows]))}, (part,), rows, {"empty": 1})
        write_part(str(run), f"part-001-{part:06d}.parquet", table, info, schema)
    return str(run)
