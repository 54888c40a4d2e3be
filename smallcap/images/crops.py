"""The crops of an image that a model's encoders take, and how they are cut from an image file.

This module does not import torch, so that the processes which only decode images start quickly and stay small.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from smallcap.config import DecodeMode
from smallcap.images.decode import (
    Preprocessing,
    ScaledImage,
    as_rgb,
    crop_pixels,
    decode_image,
    decode_scaled,
    resized_sides,
)
from smallcap.images.decoding_room import decoding_room
from smallcap.images.opening import MAX_IMAGE_PIXELS, damaged

_RESIZED_BYTES = 8  # for a pixel: a resized image, and what its first pass makes; large where it is long and narrow


@dataclass(frozen=True)
class Pixels:
    """The crops of one image, as the encoders take them: the result of a CPU task."""

    vision: np.ndarray  # [S, S, 3] uint8
    retrieval: np.ndarray | None  # [S', S', 3] uint8; None where the retrieval encoder takes the same crop
    width: int  # px of the whole image
    height: int  # px of the whole image
    by_pillow: bool = True  # False where a faster decoder decoded it
    key: int | None = None  # the content key where it has been computed

    @property
    def content_key(self) -> int:
        """An int64 that identifies an image by its pixels, whatever its name and place."""
        if self.key is not None:
            return self.key
        digest = hashlib.blake2b(self.vision.tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class CropPlan:
    """The crops that the model needs of every image; small enough to send to every decoding task."""

    vision: Preprocessing
    retrieval: Preprocessing | None  # None where there is no retrieval encoder, or it takes the same crop
    decode: DecodeMode = "exact"

    @classmethod
    def of(cls, vision: Preprocessing, retrieval: Preprocessing | None, decode: DecodeMode = "exact") -> CropPlan:
        """Returns the plan for two encoders; the second may be missing, or take the same crop as the first."""
        return cls(vision, None if retrieval == vision else retrieval, decode)

    @property
    def image_bytes(self) -> int:
        """The memory that the crops of one image take."""
        return sum(3 * crop.size_px**2 for crop in (self.vision, self.retrieval) if crop)

    def crop(self, data: bytes | Image.Image, max_pixels: int = MAX_IMAGE_PIXELS, where: str = "") -> Pixels:
        """Decodes an image and cuts its crops.

        Raises:
            RowError: The image cannot be decoded.
        """
        if isinstance(data, Image.Image):
            return self._cut(ScaledImage.whole(as_rgb(data, where)), where)
        least_px = max(crop.size_px for crop in (self.vision, self.retrieval) if crop)
        with decoding_room(where) as room:

            def reserve(width: int, height: int, pixel_bytes: int) -> None:
                resized = min(math.prod(resized_sides(width, height, least_px)), MAX_IMAGE_PIXELS)
                room.take(width * height * pixel_bytes + resized * _RESIZED_BYTES)

            if self.decode == "exact":
                return self._cut(ScaledImage.whole(decode_image(data, max_pixels, where, reserve)), where)
            return self._cut(decode_scaled(data, least_px, max_pixels, where, reserve), where)

    def _cut(self, decoded: ScaledImage, where: str) -> Pixels:
        try:
            return self._crops(decoded)
        except MemoryError as error:
            raise damaged(error, "The image cannot be resized", where) from error

    def _crops(self, decoded: ScaledImage) -> Pixels:
        return Pixels(
            vision=crop_pixels(decoded.image, self.vision),
            retrieval=crop_pixels(decoded.image, self.retrieval) if self.retrieval else None,
            width=decoded.width,
            height=decoded.height,
            by_pillow=decoded.by_pillow,
        )
