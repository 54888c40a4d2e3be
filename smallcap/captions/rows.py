"""What a file of captions gives: one row for each caption, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from smallcap.errors import SchemaError

MALFORMED = "malformed"
_FOUND_CHARACTERS = 200


class CaptionColumns(NamedTuple):
    """Where tables keep what is read of them; COCO's and Karpathy's files have layouts of their own.

    Attributes:
        caption: Holds the captions; its plural stands in for it.
        image_id: Names the image. This column and the ones below are ignored where a table has no such column.
        image_path: Says where the image is, if that is not what names it.
        embedding: Holds a Parquet file's embeddings.
        dim: How many numbers an embedding has; by default as many as the first one.
        several: Whether a row may hold a list of captions. Never beside embeddings, which belong to one caption.
        tokens: Whether Karpathy's captions are their `tokens` (lower case, no punctuation), as far as they have these.
        remedy: What errors advise where a column is missing or of a wrong type.
    """

    caption: str
    image_id: str | None = None
    image_path: str | None = None
    embedding: str | None = None
    dim: int | None = None
    several: bool = True
    tokens: bool = False
    remedy: str = "Name the columns with --text-column and --image-id-column."


class CaptionRow(NamedTuple):
    """One caption as it stands in its file, or what stands in place of one.

    Attributes:
        text: The caption; empty where there is none.
        image_id: Names the image that it was written for: in COCO's and Karpathy's files by the file name.
        line: Counted from 1, of a text file or of the list `entries`; of a table without lines the row.
        problem: Why the row cannot be used: `malformed`, or `bad_embedding`.
        vector: The embedding where the file has one: a unit vector as raw little-endian float16 or float32, told
            apart by their length (2 or 4 bytes for each dimension).
        image_path: Where the image is, if the file says so in another way than by `image_id`.
        dataset_id: The number that COCO gave the image.
        split: The split that Karpathy put the image in.
        entries: The list within a JSON file that `line` counts in, such as `annotations`.
        found: What there is where a caption should be.
    """

    text: str
    image_id: str | None
    line: int
    problem: str = ""
    vector: bytes | None = None
    image_path: str | None = None
    dataset_id: str | None = None
    split: str | None = None
    entries: str | None = None
    found: str = ""

    @property
    def place(self) -> str:
        """Names the row for people."""
        return f"line {self.line}" if self.entries is None else f"{self.entries}[{self.line - 1}]"


def json_row(text: Any, image_id: Any, line: int, entry: Any, **facts: Any) -> CaptionRow:
    """Makes a row of JSON values; a missing text is an empty one, and an id may be a number.

    Args:
        text: Of the caption.
        image_id: Of its image.
        line: As in the row.
        entry: What both come from, to be shown where it has no caption.
        facts: Further fields of the row.
    """
    if (text is None or isinstance(text, str)) and (image_id is None or isinstance(image_id, str | int)):
        name = None if image_id is None else str(image_id)
        return CaptionRow(text or "", name, line, found="" if text else repr(entry)[:_FOUND_CHARACTERS], **facts)
    return malformed_row(line, entry, **facts)


def malformed_row(line: int, entry: Any, **facts: Any) -> CaptionRow:
    """Makes the row of an entry that cannot be read; `facts` are what is known of it nevertheless."""
    return CaptionRow("", None, line, MALFORMED, found=repr(entry)[:_FOUND_CHARACTERS], **facts)


def find_column(names: Iterable[str], columns: CaptionColumns, uri: str) -> str:
    """Returns the column of a table that holds captions: the wanted one, or its plural.

    Raises:
        SchemaError: There is neither.
    """
    names = list(names)
    for name in (columns.caption, f"{columns.caption}s"):
        if name in names:
            return name
    raise SchemaError(
        "The file has no column of captions.",
        where=uri,
        expected=columns.caption,
        found=", ".join(names[:20]) or "no columns",
        remedy=columns.remedy,
    )
