"""Reference captions by image, and which of these images a run's `image_id` means.

Runs name images by path, by key or by the user's ids; references name them by file name, number, or both. `find` tries
exact names first and looser ones later; a name that fits two images means neither.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from smallcap.captions.reader import open_captions
from smallcap.captions.rows import CaptionColumns, CaptionRow
from smallcap.errors import ConfigError, SchemaError
from smallcap.evaluation.ptb_tokenizer import tokenize_in_python

_TRAILING_NUMBER = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class ReferenceImage:
    """An image with its reference captions.

    Args:
        name: File name, or the id where there is none; unique among the references.
        captions: At least one caption.
        image_id: The data set's id, if there is one besides the file name.
    """

    name: str
    captions: tuple[str, ...]
    image_id: str | None = None


class References:
    """The reference captions of a data set.

    Args:
        images: Images with different names.
        where: Name of the file in errors.
        dropped: How many rows of the file are not references, by reason.

    Raises:
        SchemaError: There are no images, or two with the same name.
    """

    def __init__(
        self, images: Iterable[ReferenceImage], where: str, dropped: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.where, self.dropped = where, dict(dropped)
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
            raise SchemaError(
                "There are no reference captions.",
                where=where,
                expected="captions, each with the id of its image",
                found=", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "no rows",
                remedy="Give a file with captions, and name its columns with --text-column and --image-id-column.",
            )
        self._keyed = keyed

    def find(self, image_id: str) -> str | None:
        """Returns the name of the image that a run's `image_id` means; None if no image fits, or several do.

        It tries in this order: the name or the id; the file name without folders; the file name without its suffix; the
        number at its end, if the references' file names end with their ids, as COCO's do.
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


def load_references(uri: str, columns: CaptionColumns, split: str | None = None) -> References:
    """Loads the reference captions of a file.

    Args:
        uri: COCO captions, Karpathy's splits, or a table.
        columns: Columns of a table that hold captions and images.
        split: One of Karpathy's splits, such as `test`; by default all.

    Raises:
        SchemaError: The file is damaged, or no row has a caption and names its image.
        ConfigError: The file's suffix is unknown, or the file does not have the split.
        StorageError: The file cannot be read.
    """
    images: dict[tuple[str, str | None], list[str]] = {}
    splits: set[str] = set()
    dropped: Counter[str] = Counter()
    first_dropped: CaptionRow | None = None
    with open_captions(uri, columns) as rows:
        for row in rows:
            if split is not None and row.split is not None:
                splits.add(row.split)
                if row.split != split:
                    continue
            reason = row.problem or ("" if row.text.strip() else "empty") or ("" if row.image_id else "nameless")
            if reason:
                dropped[reason] += 1
                first_dropped = first_dropped or row
                continue
            if row.split is None and split is not None:
                raise ConfigError(
                    "These captions are not divided into splits.",
                    where=uri,
                    found=split,
                    remedy="Leave --split out; each split has a file of its own.",
                )
            images.setdefault((row.image_id or "", row.dataset_id), []).append(row.text)
    if split is not None and splits and split not in splits:
        expected = ", ".join(sorted(splits))
        raise ConfigError("The references have no such split.", where=uri, expected=expected, found=split)
    if not images and first_dropped is not None:
        raise SchemaError(
            "No row of the references is the caption of an image.",
            where=f"{uri}: {first_dropped.place}",
            expected="a caption and the id of its image",
            found=first_dropped.found or repr(first_dropped.text),
            remedy=columns.remedy,
        )
    references = []
    for (name, number), texts in images.items():
        if any(map(tokenize_in_python, texts)):
            references.append(ReferenceImage(name, tuple(texts), number))
        else:  # metrics fail where an image's references have no word
            dropped["empty"] += len(texts)
    return References(references, uri, dropped)
