"""Reads text tables: encodings, line ends, separators, quotes, and what the first line means.

Captions and lists of images share this reader. A line that is not a row never takes others with it: it is given as it
is, and the caller counts it. Only a file that is not the text it should be stops the reading.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from typing import IO, Any, NamedTuple, cast

from smallcap import storage
from smallcap.errors import SchemaError
from smallcap.field_values import parse_json

LINE_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (*LINE_FORMATS, *(f"{suffix}.gz" for suffix in LINE_FORMATS), ".json", ".json.gz", ".parquet")
"""Endings of the tables that captions and lists of images are read from."""

_log = logging.getLogger(__name__)
_PROBE_BYTES = 1 << 16
_SHOWN_CHARACTERS = 100
_LONGEST_LINE = 16 << 20  # characters; a compressed file of kilobytes may hold a line of gigabytes
_ENCODINGS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))
_UNDECODED = re.compile("[\udc80-\udcff]")  # what Python makes of bytes that are not UTF-8
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "|"}
_QUOTED = ",;"  # separators of files in which quotes have a meaning; TSV has no quotes, nor have files with |
_URL = re.compile(r"[a-z0-9]+://\S+", re.IGNORECASE)
_NAME = re.compile(r"[^\s]+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic)(#\d+)?", re.IGNORECASE)
_NUMBERED = re.compile(r"#\d+$")  # Flickr8k numbers an image's captions: name.jpg#0
_FLICKR30K = ["image_name", "comment_number", "comment"]


def format_of(uri: str) -> str:
    """Returns the suffix that names a file's format, in lower case; compressed text is named by the suffix before."""
    suffix = storage.suffix_of(uri)
    return storage.suffix_of(uri[: -len(suffix)]) if suffix == ".gz" else suffix


@lru_cache(maxsize=1000)
def announce(note: str) -> None:
    """Says once in each process how a table is read."""
    _log.warning(note)


class TextTable(NamedTuple):
    """A text table whose first line has been read.

    Attributes:
        names: The columns' names, from the first line or from the shape of the rows.
        rows: Each row's line, counted from 1, and its fields; a string is a line that is not a row of this table.
        caption: The name of the column of captions, where the layout tells it.
        image: The name of the column of images, where the layout tells it.
        seen: The encoding, the separator and the first line, for messages.
        note: How the table is read, where its first line does not say it; else empty.
    """

    names: list[str]
    rows: Iterator[tuple[int, list[str] | str]]
    caption: str | None = None
    image: str | None = None
    seen: str = ""
    note: str = ""


def read_table(file: IO[bytes], uri: str, wanted: Sequence[str]) -> TextTable:
    """Reads the first line of a CSV, TSV or other table, and finds out how the rows are written.

    Args:
        file: The file, opened for reading bytes.
        uri: The file's URI, for errors; its suffix names the separator that is tried first.
        wanted: Names of which the table needs one.

    Raises:
        SchemaError: The file is not the text that it should be; reading the rows may raise it as well.
    """
    with _whole(uri):
        text = open_text(file)
    lines = _lines(text, uri)
    first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    marks = sorted(_SEPARATORS, key=lambda mark: (format_of(uri) == ".tsv") == (mark != "\t"))  # the usual one first
    split = {mark: _first_fields(first, mark) for mark in marks}
    mark, names = max(split.items(), key=lambda entry: (not {*wanted}.isdisjoint(entry[1]), len(entry[1])))
    encoding = text.encoding.upper().removesuffix("-SIG")
    seen = f"{encoding}, separated by {_SEPARATORS[mark]}; first line {first[1].strip()[:_SHOWN_CHARACTERS]!r}"
    if names == _FLICKR30K and {*wanted}.isdisjoint(names):
        note = f"{uri}: read as Flickr30k has it: comment is the caption, image_name the image."
        return TextTable(names, _rows(lines, mark, len(names)), "comment", "image_name", seen, note)
    if not {*wanted}.isdisjoint(names):
        return TextTable(names, _rows(lines, mark, len(names)), seen=seen)
    for own, fields in split.items():
        if (image := _place_of_image(fields)) is not None:
            kind = "url" if _URL.fullmatch(fields[image]) else "image"
            pair = [kind, "caption"] if image == 0 else ["caption", kind]
            rows = _rows(chain([first], lines), own, 2)
            if kind == "image":
                rows = _without_numbers(rows, image)
            return TextTable(pair, rows, "caption", kind, seen, f"{uri}: read as {', '.join(pair)} without a header.")
    return TextTable(names if any(names) else [], iter(()), seen=seen)


def json_lines(file: IO[bytes], uri: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields each line's number and its JSON object; a string is a line that holds none. Blank lines are not rows.

    Raises:
        SchemaError: The file is not the text that it should be.
    """
    for number, line in text_lines(file, uri):
        if line.strip():
            try:
                entry = parse_json(line)
            except (ValueError, RecursionError):
                entry = None
            yield number, entry if isinstance(entry, dict) else line


def text_lines(file: IO[bytes], uri: str) -> Iterator[tuple[int, str]]:
    """Yields each line with its end and its number from 1, of text in UTF-8, or in UTF-16 with a byte order mark.

    Lines end in LF or CRLF; they end in CR where the file begins without LF. The file may be compressed with gzip.

    Raises:
        SchemaError: A line is not in this encoding, or the compressed file is damaged.
    """
    with _whole(uri):
        text = open_text(file)
    yield from _lines(text, uri)


def _lines(text: io.TextIOWrapper, uri: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _whole(uri):
            for number, line in enumerate(iter(partial(text.readline, _LONGEST_LINE), ""), start=1):
                if len(line) == _LONGEST_LINE:
                    raise _too_long(number, uri)
                if not line.isascii():
                    _check_decoded(number, line, uri)
                yield number, line
    except UnicodeDecodeError as error:
        where = f"{uri}: after line {number}"
        raise SchemaError("The file is not UTF-16, as its first bytes say.", where=where, found=str(error)) from error


def _too_long(number: int, uri: str) -> SchemaError:
    return SchemaError(
        "A line of the file is too long to be a row.",
        where=f"{uri}: line {number}",
        expected=f"fewer than {_LONGEST_LINE:,} characters",
        remedy="If images lie in the file itself, pack them as a tar or as Parquet.",
    )


def _check_decoded(number: int, line: str, uri: str) -> None:
    if not (wrong := _UNDECODED.search(line)):
        return
    column = len(line[: wrong.start()].encode("utf-8", "surrogateescape")) + 1
    raise SchemaError(
        "The file is not UTF-8.",
        where=f"{uri}: line {number}",
        found=f"byte 0x{ord(wrong[0]) - 0xDC00:02x} in column {column}",
        remedy="Convert the file first, for example with iconv -f latin1 -t utf-8.",
    )


@contextmanager
def _whole(uri: str) -> Iterator[None]:
    """Turns the errors of a damaged compressed file into one that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SchemaError("The compressed file is damaged.", where=uri, found=str(error)) from error


def open_text(file: IO[bytes]) -> io.TextIOWrapper:
    """Opens a file for reading text; bytes that are not UTF-8 become the code points U+DC80 to U+DCFF."""
    file = decompressed(file)
    start = _probe(file)
    encoding = _encoding(start)
    characters = start.decode(encoding, "replace")
    line_end = "\n" if "\n" in characters or "\r" not in characters else "\r"
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    return io.TextIOWrapper(file, encoding, errors, newline=line_end)


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """Returns the file, or its content where it is compressed with gzip."""
    magic = file.read(2)
    file.seek(0)
    return cast("IO[bytes]", gzip.open(file)) if magic == b"\x1f\x8b" else file


def _probe(file: IO[bytes]) -> bytes:
    start = file.read(_PROBE_BYTES)
    file.seek(0)
    return start


def _encoding(start: bytes) -> str:
    return next((encoding for mark, encoding in _ENCODINGS if start.startswith(mark)), "utf-8")


def _first_fields(line: tuple[int, str], mark: str) -> list[str]:
    """Returns the fields of a first line without blanks around them; none where it is not a row."""
    text = line[1].strip("\r\n")
    try:
        fields = next(csv.reader([text], delimiter=mark, strict=True), []) if mark in _QUOTED else text.split(mark)
    except csv.Error:
        return []
    return [field.strip() for field in fields]


def _place_of_image(fields: list[str]) -> int | None:
    """Returns which of two fields names an image, where the other one does not; such a line cannot be a header."""
    places = [place for place, field in enumerate(fields) if _URL.fullmatch(field) or _NAME.fullmatch(field)]
    return places[0] if len(fields) == 2 and len(places) == 1 and all(fields) else None


def _without_numbers(rows: Iterable[tuple[int, list[str] | str]], image: int) -> Iterator[tuple[int, list[str] | str]]:
    for line, fields in rows:
        if not isinstance(fields, str):
            fields[image] = _NUMBERED.sub("", fields[image])
        yield line, fields


def _rows(lines: Iterator[tuple[int, str]], mark: str, width: int) -> Iterator[tuple[int, list[str] | str]]:
    """Yields each record's first line and its fields, or that line where it is not a record of `width` fields.

    A quote that never closes, or that closes where it may not, spoils the line it stands in and no other: reading goes
    on with the next line. No field is longer than `csv.field_size_limit`, so few lines are read again.
    """
    again: deque[tuple[int, str]] = deque()
    read: list[tuple[int, str]] = []  # the lines of a record with quotes

    def following() -> Iterator[str]:
        while (item := again.popleft() if again else next(lines, None)) is not None:
            read.append(item)
            yield item[1]

    quoted = mark in _QUOTED
    reader = csv.reader(following(), delimiter=mark, strict=True)
    while (item := again.popleft() if again else next(lines, None)) is not None:
        number, line = item
        if not quoted or '"' not in line:
            if line := line.rstrip("\r\n"):
                fields = line.split(mark)
                if mark == "|":
                    fields = [field.strip() for field in fields]
                yield number, fields if len(fields) == width else line
            continue
        again.appendleft(item)
        read.clear()
        try:
            fields = next(reader)
        except csv.Error:
            fields = []
        if len(fields) != width and len(read) > 1:
            again.extendleft(reversed(read[1:]))
            reader = csv.reader(following(), delimiter=mark, strict=True)  # the file may have ended for the other
        yield number, fields if len(fields) == width else line.rstrip("\r\n")
