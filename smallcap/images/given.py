"""Takes images as Python code has them: paths and URIs, the bytes of files, PIL images and arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from smallcap import storage
from smallcap.errors import ErrorCode, RowError
from smallcap.images.crops import CropPlan, Pixels
from smallcap.images.decode import as_rgb
from smallcap.images.fetching import FetchOptions, fetch_objects
from smallcap.images.opening import damaged
from smallcap.images.orientation import read_orientation, upright
from smallcap.local_files import as_text

GivenImage = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

_ONE_IMAGE = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
_EXPECTED = (
    "a path or URI (str or os.PathLike), the bytes of an image file, a PIL image, "
    "or a uint8 array [H, W], [H, W, 3] or [H, W, 4]"
)


def crop_given(
    images: Iterable[GivenImage], plan: CropPlan, max_pixels: int, allow_private_hosts: bool = False
) -> list[Pixels | RowError]:
    """Fetches what is named by a path or URI, all at once, and cuts each image's crops.

    A PIL image is taken as its pixels are. Only one that still is the file that `Image.open` opened is turned upright,
    as the file itself would be.

    Args:
        images: The images. http(s)://, s3://, gs://, az:// and other fsspec URIs are read as captioning jobs read them.
        plan: The crops to cut.
        max_pixels: Files with more pixels become errors.
        allow_private_hosts: Whether http(s) URLs may lead to addresses that are not public.

    Returns:
        The crops of each image, or why there are none, in order.

    Raises:
        TypeError: A single image is given in place of several, or something is not an image.
        StorageError: An object store fails as a whole.
    """
    taken = [_checked(image, position) for position, image in enumerate(_several(images))]
    options = FetchOptions(private_hosts=allow_private_hosts)
    fetched = iter(_fetch([image for image in taken if isinstance(image, str)], options))
    return [
        _crop(next(fetched), plan, max_pixels, where=image)
        if isinstance(image, str)
        else _crop(image, plan, max_pixels, where=f"images[{position}]")
        for position, image in enumerate(taken)
    ]


def _several(images: Any) -> Iterable[Any]:
    single = isinstance(images, _ONE_IMAGE) or (isinstance(images, np.ndarray) and images.ndim in (2, 3))
    if single or isinstance(images, Mapping) or not isinstance(images, Iterable):
        remedy = " For one image write [image]." if single else ""
        raise TypeError(f"images: expected a list or another iterable of images, found {_describe(images)}.{remedy}")
    return images


def _checked(image: Any, position: int) -> str | bytes | Image.Image:
    """Returns an image as a path or URI, the bytes of a file, or a PIL image.

    Raises:
        TypeError: It is nothing of this kind.
    """
    if isinstance(image, str | os.PathLike):
        name = os.fsdecode(os.fspath(image))
        return as_text(name) if storage.is_local(name) else name
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Image.Image):
        return image
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and (image.ndim == 2 or image.shape[2:] in ((3,), (4,)))
    ):
        return Image.fromarray(image) if image.size else Image.new("RGB", (0, 0))
    raise TypeError(f"images[{position}]: expected {_EXPECTED}, found {_describe(image)}.")


def _describe(value: Any) -> str:
    """Returns what was given, in words: its type, and for an array or a tensor its data type and shape."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return f"{name} of {dtype} {list(shape)}" if shape is not None and dtype is not None else name


def _fetch(uris: Sequence[str], options: FetchOptions) -> list[bytes | RowError]:
    if not uris:
        return []
    # In a notebook this thread has an event loop that runs, and asyncio allows no second one in it.
    with ThreadPoolExecutor(1, thread_name_prefix="fetch-given") as pool:
        return pool.submit(fetch_objects, uris, options).result().data


def _crop(image: bytes | Image.Image | RowError, plan: CropPlan, max_pixels: int, where: str) -> Pixels | RowError:
    try:
        if isinstance(image, RowError):
            return image
        return plan.crop(_upright(image, where) if isinstance(image, Image.Image) else image, max_pixels, where)
    except RowError as error:
        return error


def _upright(image: Image.Image, where: str) -> Image.Image:
    if not all(image.size):
        raise RowError(ErrorCode.EMPTY, "The image has no pixels.", where=where)
    try:
        image.load()  # what `Image.open` opened has not been read yet
    except Exception as error:  # the plugin of a format can raise nearly anything for a damaged file
        raise damaged(error, "The image data ends early or is damaged", where) from error
    pixels = as_rgb(image, where)
    # Pillow itself turns a TIFF when it loads its pixels.
    is_file = isinstance(image, ImageFile.ImageFile) and image.format != "TIFF"
    return upright(pixels, read_orientation(image, b"")) if is_file else pixels
