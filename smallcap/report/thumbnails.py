"""Reads a run's images again, and makes small WebP pictures of them that a page can hold as data URIs.

An image that cannot be read any more becomes a reason. A report never fails because its images are gone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

import pyarrow as pa
from PIL import Image

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError, RunError, StorageError
from smallcap.images.decode import decode_scaled
from smallcap.images.fetching import FETCH_CONCURRENCY, FetchOptions, fetch_objects
from smallcap.images.fragments import Fragment
from smallcap.images.work_list import read_fragment
from smallcap.report.sampling import name_keys

Thumbnail = str | RowError  # a data URI, or why there is none

_EDGES_PX = (384, 320, 256, 192, 160, 128, 96, 64, 48, 32)
_QUALITIES = (80, 60)
_BYTES_PER_PIXEL = 0.12  # of a usual photograph
_LONGEST_SHAPE = 4  # sides; what is longer is cropped
_MOST_CONTAINER_BYTES = 4_000_000_000  # of tars and Parquet files that are read for the sake of a few images
_MOST_CONTAINERS = 256
_THREADS = 4
_FETCHING = FetchOptions(timeout_s=20, attempts=2)


class Containers:
    """The tars and Parquet files in which a run's images lie, as far as a report reads them.

    They have to be read from front to back. Only as many are taken as have four gigabytes together, in an order that is
    random and always the same.

    Args:
        fragments: The run's fragments.
    """

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        packed = [fragment for fragment in fragments if fragment.kind != "uris"]
        self._fragments = {uri: list(some) for uri, some in groupby(packed, key=lambda fragment: fragment.uri)}
        self._taken = set(_affordable(list(self._fragments)))

    @property
    def has_all(self) -> bool:
        """Whether every file is read."""
        return len(self._taken) == len(self._fragments)

    def is_readable(self, image_uri: str) -> bool:
        """Says whether an image's file may be read: it lies alone, or in one of the files that are taken."""
        container = self.container_of(image_uri)
        return container is None or container in self._taken

    def container_of(self, image_uri: str) -> str | None:
        """Returns the tar or Parquet file in which an image lies; None for one that lies alone."""
        place = image_uri.find("#")
        while place >= 0:
            if image_uri[:place] in self._fragments:
                return image_uri[:place]
            place = image_uri.find("#", place + 1)
        return None

    def read(self, container: str, image_uris: Sequence[str], config: InputConfig) -> Iterator[tuple[str, bytes]]:
        """Yields the files of images in one container, until all were found or it ends.

        Raises:
            RunError: It cannot be read.
        """
        missing = set(image_uris)
        for fragment in self._fragments[container]:
            for batch in read_fragment(fragment, None, config, pa.schema([])):
                for uri, data in zip(batch.image_uris, batch.data or (), strict=True):
                    if uri in missing:
                        missing.remove(uri)
                        if isinstance(data, RowError):
                            continue
                        yield uri, data
                if not missing:
                    return


def _affordable(uris: Sequence[str]) -> Iterator[str]:
    """Yields the files that are read; one that cannot be found costs nothing."""
    keys = name_keys(uris)
    left = _MOST_CONTAINER_BYTES
    for _, uri in sorted(zip(keys.tolist(), uris, strict=True))[:_MOST_CONTAINERS]:
        with suppress(StorageError):
            left -= storage.size(uri) or 0
        yield uri
        if left <= 0:
            return


def read_thumbnails(
    image_uris: Sequence[str], most_bytes: int, containers: Containers, config: InputConfig
) -> dict[str, Thumbnail]:
    """Makes a thumbnail of each image.

    Args:
        image_uris: The images.
        most_bytes: The most bytes of all data URIs together.
        containers: The files in which images lie.
        config: The run's input config.

    Returns:
        For each image a data URI, or why there is none.
    """
    each = max(400, int(most_bytes * 3 / 4 / max(1, len(image_uris))) - 32)
    alone = [uri for uri in image_uris if containers.container_of(uri) is None]
    inside = sorted(set(image_uris) - set(alone), key=lambda uri: (containers.container_of(uri) or "", uri))
    thumbnails: dict[str, Thumbnail] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(alone), FETCH_CONCURRENCY):
            uris = alone[start : start + FETCH_CONCURRENCY]
            files = pool.submit(_fetch, uris, config).result()
            made = pool.map(lambda uri, data: _thumbnail(uri, data, each), uris, files)
            thumbnails |= zip(uris, made, strict=True)
        for container, uris_of in groupby(inside, key=containers.container_of):
            uris = list(uris_of)
            try:
                if containers.is_readable(uris[0]):
                    found = containers.read(container or "", uris, config)
                    thumbnails |= {uri: _thumbnail(uri, data, each) for uri, data in found}
                    gone = RowError(ErrorCode.NOT_FOUND, "The file does not have this image any more.")
                else:
                    gone = RowError(ErrorCode.TOO_LARGE, "A report reads only a few of so many large files.")
            except RunError as error:
                gone = RowError(ErrorCode.UNAVAILABLE, error.what)
            thumbnails |= {uri: gone for uri in uris if uri not in thumbnails}
    return thumbnails


def _fetch(uris: Sequence[str], config: InputConfig) -> Sequence[bytes | RowError]:
    try:
        return fetch_objects(uris, replace(_FETCHING, private_hosts=config.allow_private_hosts)).data
    except StorageError as error:
        return [RowError(ErrorCode.UNAVAILABLE, error.what)] * len(uris)


def _thumbnail(uri: str, data: bytes | RowError, most_bytes: int) -> Thumbnail:
    if isinstance(data, RowError):
        return data
    likely_px = (most_bytes / _BYTES_PER_PIXEL) ** 0.5
    edges = [edge for edge in _EDGES_PX if edge <= likely_px] or _EDGES_PX[-1:]
    try:
        image = _without_ends(decode_scaled(data, edges[0], where=uri).image)
    except RowError as error:
        return error
    return f"data:image/webp;base64,{base64.b64encode(_encode(image, edges, most_bytes)).decode()}"


def _without_ends(image: Image.Image) -> Image.Image:
    """Returns the middle of an image that is very long or high; others as they are."""
    width, height = image.size
    most = _LONGEST_SHAPE * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def _encode(image: Image.Image, edges: Sequence[int], most_bytes: int) -> bytes:
    """Returns a WebP file of the largest edge and the best quality that the bytes allow, or the smallest of all."""
    data, likely_px = b"", math.inf
    for edge in edges:
        if edge > likely_px and edge != edges[-1]:
            continue
        small = image.copy()
        small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=quality)
            data = buffer.getvalue()
            if len(data) <= most_bytes:
                return data
        likely_px = edge * (most_bytes / len(data)) ** 0.5
    return data
