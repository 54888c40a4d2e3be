"""The rows that every captions file gives, one for each caption, and how they are made from its entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from smallcap.errors import SchemaError
from smallcap.field_values import id_text, is_text

MALFORMED = "malformed"
_FOUND_CHARACTERS = 200


class CaptionColumns(NamedTuple):
    """The columns to read from tables; COCO's and Karpathy's files have fixed layouts.

    Attributes:
        caption: The column of captions; its plural is accepted.
        image_id: The column that names the image. It and the next two are ignored where a table lacks them.
        image_path: The column of the image's path, where its name is not its path.
        embedding: The column of embeddings in a Parquet file.
        dim: The length of an embedding; by default that of the first one.
        several: Whether a row may hold a list of captions. Ignored where rows have embeddings, one per caption.
        tokens: Whether to read Karpathy's `tokens` (lower case, no punctuation) where a sentence has them.
        remedy: The advice of errors about a column that is missing or has the wrong type.
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
    """One caption as its file has it, or an entry that is not a caption.

    Attributes:
        text: The caption; empty where there is none.
        image_id: The name of the caption's image; in COCO's and Karpathy's files the file name.
        line: The line of a text file, the place in the list `entries`, or the row of a table; counted from 1.
        problem: Why the row cannot be used: `malformed` or `bad_embedding`; else empty.
        vector: The embedding, where the file has one: a unit vector as raw little-endian float16 or float32. Its length
            tells which (2 or 4 bytes for each dimension).
        image_path: The path of the image, where the file has one besides `image_id`.
        dataset_id: The image's number in COCO.
        split: The image's split in Karpathy's files.
        entries: The list within a JSON file in which `line` counts, such as `annotations`.
        found: The entry, where it has no caption.
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
        """The place of the row in its file, for messages."""
        return f"line {self.line}" if self.entries is None else f"{self.entries}[{self.line - 1}]"


def json_row(text: Any, image_id: Any, line: int, entry: Any, **facts: Any) -> CaptionRow:
    """Makes a row from JSON values; a missing text becomes empty, and an id may be a number.

    Args:
        text: The caption.
        image_id: The id of the image.
        line: The row's `line`.
        entry: The entry that holds both, which is shown where it has no caption.
        facts: Other fields of the row.
    """
    name = id_text(image_id)
    if (text is None or isinstance(text, str)) and (image_id is None or name is not None):
        return CaptionRow(text or "", name, line, found="" if text else repr(entry)[:_FOUND_CHARACTERS], **facts)
    return malformed_row(line, entry, **facts)


def malformed_row(line: int, entry: Any, **facts: Any) -> CaptionRow:
    """Makes the row of an entry that cannot be read; `facts` are the fields that are known even so."""
    return CaptionRow("", None, line, MALFORMED, found=repr(entry)[:_FOUND_CHARACTERS], **facts)


def readable(row: CaptionRow) -> CaptionRow:
    """Returns the row, or a malformed one where its text or the names of its image hold what no text holds."""
    for field in (row.text, row.image_id, row.image_path, row.dataset_id, row.split):
        if field and not is_text(field):
            entry = repr(field)[:_FOUND_CHARACTERS]
            return row._replace(text="", image_id=None, image_path=None, problem=MALFORMED, found=entry)
    return row


def accepted_names(columns: CaptionColumns) -> tuple[str, str]:
    """Returns the names of a column of captions: the wanted one and its plural."""
    return columns.caption, f"{columns.caption}s"


def find_column(names: Iterable[str], columns: CaptionColumns, uri: str, seen: str = "") -> str:
    """Returns the name of a table's column of captions: the wanted name or its plural.

    Args:
        names: The table's columns.
        columns: The wanted columns.
        uri: The table's URI, for errors.
        seen: What else is known of the table, for errors.

    Raises:
        SchemaError: The table has neither column.
    """
    names = list(names)
    for name in accepted_names(columns):
        if name in names:
            return name
    raise SchemaError(
        "The file has no column of captions.",
        where=uri,
        expected=columns.caption,
        found=(", ".join(names[:20]) or "no columns") + (f" ({seen})" if seen else ""),
        remedy=f"{columns.remedy} If the first line is a row, write a line of names above it."
        if seen
        else columns.remedy,
    )
