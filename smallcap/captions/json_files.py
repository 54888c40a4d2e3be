"""Reads captions from whole JSON files: COCO's annotations, Karpathy's splits, and lists of texts."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO, Any

from smallcap.captions.rows import CaptionColumns, CaptionRow, json_row, malformed_row
from smallcap.errors import SchemaError
from smallcap.field_values import id_text, parse_json
from smallcap.tables import decompressed


def read_json(file: IO[bytes], uri: str, columns: CaptionColumns) -> Iterator[CaptionRow]:
    """Reads COCO captions, Karpathy's splits or a list of texts; the content decides. See `reader.read_captions`."""
    content = load_json(file, uri)
    if isinstance(content, list) and content and isinstance(content[0], str):
        return list_rows(content)
    fields = content if isinstance(content, dict) else {}
    images, annotations = fields.get("images"), fields.get("annotations")
    images = images if isinstance(images, list) else []
    if isinstance(annotations, list):
        return _coco_rows(images, annotations)
    if any(isinstance(image, dict) and "sentences" in image for image in images):
        return _karpathy_rows(images, columns)
    raise SchemaError(
        "This JSON file holds no captions.",
        where=uri,
        expected="COCO's annotations[].caption, Karpathy's images[].sentences[].raw, or a list of strings",
        found=", ".join(list(fields)[:10]) or "no JSON object",
        remedy="Write one JSON object per line and name the file .jsonl.",
    )


def load_json(file: IO[bytes], uri: str) -> Any:
    """Returns the content of a JSON file; an integer with too many digits is infinite.

    Raises:
        SchemaError: The file is not JSON.
    """
    try:
        return parse_json(decompressed(file).read())
    except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:  # UnicodeDecodeError is one
        raise SchemaError("This is not a JSON file.", where=uri, found=str(error)) from error


def list_rows(texts: list[Any]) -> Iterator[CaptionRow]:
    """Yields a row for each element of a list of texts."""
    return (json_row(text, None, number, text, entries="") for number, text in enumerate(texts, start=1))


def _coco_rows(images: list[Any], annotations: list[Any]) -> Iterator[CaptionRow]:
    """Yields a row for each annotation, with its image's name, and one for each malformed entry."""
    names: dict[str, str] = {}
    for number, image in enumerate(images, start=1):
        entry = image if isinstance(image, dict) else {}
        name = entry.get("file_name")
        image_id = id_text(entry.get("id"))
        if image_id is None or not (name is None or isinstance(name, str)):
            yield malformed_row(number, image, entries="images")
        elif name:
            names[image_id] = name
    for number, annotation in enumerate(annotations, start=1):
        if not isinstance(annotation, dict):
            yield malformed_row(number, annotation, entries="annotations")
            continue
        image_id = annotation.get("image_id")
        dataset_id = id_text(image_id)
        image = image_id if dataset_id is None else names.get(dataset_id, dataset_id)
        text = annotation.get("caption")
        yield json_row(text, image, number, annotation, dataset_id=dataset_id, entries="annotations")


def _karpathy_rows(images: list[Any], columns: CaptionColumns) -> Iterator[CaptionRow]:
    for place, image in enumerate(images):
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not isinstance(sentences, list):
            yield malformed_row(place + 1, image, entries="images")
            continue
        name, folder, split, coco_id = (image.get(key) for key in ("filename", "filepath", "split", "cocoid"))
        dataset_id = id_text(coco_id)
        facts = {
            "image_path": f"{folder}/{name}" if folder else None,
            "dataset_id": dataset_id,
            "split": None if split is None else str(split),
            "entries": f"images[{place}].sentences",
        }
        for number, sentence in enumerate(sentences, start=1):
            if isinstance(sentence, dict) and (coco_id is None or dataset_id is not None):
                yield json_row(_karpathy_text(sentence, columns), name, number, sentence, **facts)
            else:
                yield malformed_row(number, sentence, **facts)


def _karpathy_text(sentence: dict[str, Any], columns: CaptionColumns) -> Any:
    tokens = sentence.get("tokens") if columns.tokens else None
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        return " ".join(tokens)
    return sentence.get("raw")
