"""Reference captions by image, and which of these images a run's `image_id` means.

Runs name images by path, key or an id of the user's; references name them by file name, number, or both. `find` tries
exact names first and looser ones after; a name that means two images means none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from smallcap.errors import ConfigError, SchemaError

_TRAILING_NUMBER = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class ReferenceImage:
    """An image with its reference captions.

    Args:
        name: File name, or the id where there is none; unique among the references.
        captions: At least one.
        image_id: The data set's id, where it has one beside the file name.
    """

    name: str
    captions: tuple[str, ...]
    image_id: str | None = None


class References:
    """The reference captions of a data set.

    Args:
        images: With different names.
        where: What errors call the file.

    Raises:
        SchemaError: There are no images, or two with the same name.
    """

    def __init__(self, images: Iterable[ReferenceImage], where: str) -> None:
        self.where = where
        self.captions: dict[str, tuple[str, ...]] = {}
        keyed: list[dict[str, str | None]] = [{} for _ in _KEYS]
        for image in images:
            if image.name in self.captions:
                raise SchemaError("Two images of the references have the same name.", where=where, found=image.name)
            self.captions[image.name] = image.captions
            for known, keys_of in zip(keyed, _KEYS, strict=True):
                for key in keys_of(image):
                    known[key] = None if known.get(key, image.name) != image.name else image.name
        if not self.captions:
            raise SchemaError("There are no reference captions.", where=where, remedy="Give a file with captions.")
        self._keyed = keyed

    def find(self, image_id: str) -> str | None:
        """Returns the name of the image that a run's `image_id` means; None where none or several fit.

        Tried in this order: the name or the id; the file's name without folders; that without its suffix; the number at
        its end, where the references' own file names end with their ids, as COCO's do.
        """
        asked = (image_id, _file_name(image_id), _stem(image_id), _trailing_number(image_id))
        for known, key in zip(self._keyed, asked, strict=True):
            if key in known:
                return known[key]
        return None


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]


def _stem(name: str) -> str:
    base = _file_name(name)
    return base.rpartition(".")[0] or base


def _trailing_number(name: str) -> str:
    match = _TRAILING_NUMBER.search(_stem(name))
    return match[1].lstrip("0") or "0" if match else ""


def _numbers(image: ReferenceImage) -> set[str]:
    number = _trailing_number(image.name)
    return {number} if number and image.image_id == number else set()


_KEYS: tuple[Callable[[ReferenceImage], set[str]], ...] = (
    lambda image: {image.name} | ({image.image_id} if image.image_id is not None else set()),
    lambda image: {_file_name(image.name)},
    lambda image: {_stem(image.name)},
    _numbers,
)


def parse_references(content: Any, where: str, split: str | None = None) -> References:
    """Reads references from the content of a JSON file.

    Args:
        content: COCO captions (`images`, `annotations`), or Karpathy's splits (`images[].sentences[].raw`).
        where: What errors call the file.
        split: Of Karpathy's splits, the one to take, such as `test`; by default all.

    Raises:
        SchemaError: It is neither, or an entry of it is malformed.
        ConfigError: A split is asked for that the file does not have.
    """
    content = content if isinstance(content, dict) else {}
    images, annotations = content.get("images"), content.get("annotations")
    if isinstance(annotations, list):
        if split is not None:
            raise ConfigError(
                "COCO captions have no splits inside a file.",
                where=where,
                found=split,
                remedy="Leave --split out; another split is another file.",
            )
        return References(_coco_images(images if isinstance(images, list) else [], annotations, where), where)
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        splits = {str(image.get("split")) for image in images if isinstance(image, dict)}
        if split is not None and split not in splits:
            raise ConfigError(
                "The references have no such split.", where=where, expected=", ".join(sorted(splits)), found=split
            )
        return References(_karpathy_images(images, where, split), where)
    raise SchemaError(
        "This JSON file holds no reference captions.",
        where=where,
        expected="COCO's images and annotations, or Karpathy's images[].sentences[].raw",
        found=", ".join(list(content)[:10]) or "no JSON object",
    )


def group_references(rows: Iterable[tuple[str | None, str]], where: str) -> References:
    """Groups rows of image id and caption, in any order.

    Raises:
        SchemaError: A row names no image, or there are no rows.
    """
    captions: dict[str, list[str]] = {}
    for number, (image_id, caption) in enumerate(rows, start=1):
        if not image_id:
            raise SchemaError(
                "A reference caption names no image.",
                where=f"{where}: caption {number}",
                remedy="Name the column of the images' ids with --image-id-column.",
            )
        captions.setdefault(image_id, []).append(caption)
    return References((ReferenceImage(name, tuple(texts)) for name, texts in captions.items()), where)


def _coco_images(images: list[Any], annotations: list[Any], where: str) -> list[ReferenceImage]:
    captions: dict[str, list[str]] = {}
    for number, annotation in enumerate(annotations):
        entry = annotation if isinstance(annotation, dict) else {}
        image_id, caption = entry.get("image_id"), entry.get("caption")
        if not isinstance(image_id, str | int) or not isinstance(caption, str):
            raise _malformed(f"{where}: annotations[{number}]", "an object with image_id and caption", annotation)
        captions.setdefault(str(image_id), []).append(caption)
    names = {}
    for number, image in enumerate(images):
        entry = image if isinstance(image, dict) else {}
        if not isinstance(entry.get("id"), str | int) or not isinstance(entry.get("file_name", ""), str):
            raise _malformed(f"{where}: images[{number}]", "an object with id and file_name", image)
        names[str(entry["id"])] = entry.get("file_name") or str(entry["id"])
    return [ReferenceImage(names.get(key, key), tuple(texts), key) for key, texts in captions.items()]


def _karpathy_images(images: list[Any], where: str, split: str | None) -> list[ReferenceImage]:
    found = []
    for number, image in enumerate(images):
        try:
            if split is None or image["split"] == split:
                texts = tuple(sentence["raw"] for sentence in image["sentences"])
                coco_id = str(image["cocoid"]) if "cocoid" in image else None
                found.append(ReferenceImage(image["filename"], texts, coco_id))
        except (KeyError, TypeError) as error:
            expected = "an object with filename, split and sentences[].raw"
            raise _malformed(f"{where}: images[{number}]", expected, image) from error
    return [image for image in found if image.captions]


def _malformed(where: str, expected: str, found: Any) -> SchemaError:
    return SchemaError(
        "An entry of the references is malformed.", where=where, expected=expected, found=repr(found)[:200]
    )
