"""Collects from a captioning run what an evaluation needs: captions of images with references, and a few numbers.

Rows stream by; retrieved captions are not kept. No row is lost silently: failed rows and images without references are
counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from smallcap.errors import SchemaError
from smallcap.evaluation.caption_words import retrieval_recall
from smallcap.evaluation.ptb_tokenizer import tokenize_in_python
from smallcap.evaluation.references import References
from smallcap.output.schema import STATUS_OK

COLUMNS = ("image_id", "status", "error_code", "caption", "caption_tokens", "clip_score", "neighbours", "copied_share")
VALUES = ("clip_cosine", "retrieval_recall", "copied_share", "copied", "words", "tokens")
_EXAMPLES = 5


@dataclass
class RunCaptions:
    """A run's captions of images that have references.

    Args:
        captions: Captions by the image's name in the references.
        values: Numbers of each image in the order of `VALUES`; NaN where there is none.
        rows: Number of the run's rows.
        errors: Number of rows without a caption, by error code.
        unmatched: Number of captioned images without references.
        examples: Ids of a few of these.
    """

    captions: dict[str, str] = field(default_factory=dict)
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    unmatched: int = 0
    examples: list[str] = field(default_factory=list)

    def column(self, name: str, images: Iterable[str]) -> np.ndarray:
        """Returns one of the `VALUES` for the images, in their order, as float64."""
        place = VALUES.index(name)
        return np.array([self.values[image][place] for image in images], np.float64)


def collect_run(tables: Iterable[pa.Table | pa.RecordBatch], references: References, where: str) -> RunCaptions:
    """Collects a run's captions, one table at a time.

    Args:
        tables: Tables or batches with `COLUMNS`.
        references: References of the images.
        where: Name of the run in errors.

    Raises:
        SchemaError: Two of the run's images match the same image of the references.
    """
    run = RunCaptions()
    ids: dict[str, str] = {}
    for row in (row for table in tables for row in table.to_pylist()):
        run.rows += 1
        if row["status"] != STATUS_OK:
            run.errors[row["error_code"]] += 1
            continue
        image = references.find(row["image_id"])
        if image is None:
            run.unmatched += 1
            run.examples += [row["image_id"]] * (len(run.examples) < _EXAMPLES)
            continue
        if image in ids:
            raise SchemaError(
                "Two images of the run match the same image of the references.",
                where=f"{where}: {ids[image]} and {row['image_id']}",
                found=f"{references.where}: {image}",
                remedy="Give the images ids that are the references' file names or ids.",
            )
        ids[image] = row["image_id"]
        run.captions[image] = row["caption"]
        run.values[image] = _values(row, references.captions[image])
    return run


def _values(row: dict[str, Any], references: tuple[str, ...]) -> tuple[float, ...]:
    words = tokenize_in_python(row["caption"])
    retrieved = [tokenize_in_python(neighbour["text"]) for neighbour in row["neighbours"] or ()]
    nothing = float("nan")
    return (
        nothing if row["clip_score"] is None else row["clip_score"],
        retrieval_recall(list(map(tokenize_in_python, references)), retrieved) if retrieved else nothing,
        nothing if row["copied_share"] is None else row["copied_share"],
        float(words in retrieved) if retrieved else nothing,
        float(len(words.split())),
        nothing if row["caption_tokens"] is None else float(row["caption_tokens"]),
    )
