"""Embeds a sample of images as calibration queries, in actors, which import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from index_builder.embedding.slices import CachedEncoder
from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError, RowError
from smallcap.images.decode import crop_pixels, decode_image
from smallcap.images.fetching import fetch_objects
from smallcap.images.listing import no_images
from smallcap.images.sorting import Duplicates, sort_images, unique_images
from smallcap.images.sources import ImageSources

IMAGES_PER_TASK = 64
LEAST_IMAGES = 32


@dataclass(frozen=True)
class EmbeddedImages:
    """Embeddings of the images that could be read, and the number of those that could not."""

    vectors: np.ndarray  # [n, dim] float32
    failed: int


class EmbedImages:
    """Fetches, decodes and embeds images; one instance per actor.

    Args:
        encoder: The retrieval encoder.
        device: Torch device.
        dtype: Precision of the encoder's weights.
    """

    def __init__(self, encoder: CachedEncoder, device: str, dtype: str) -> None:
        from smallcap.model.clip_encoder import load_retrieval_encoder

        self._encoder = load_retrieval_encoder(encoder.identity.spec, device, dtype, encoder.cache_dir)
        self._dtype = dtype

    def __call__(self, uris: Sequence[str]) -> EmbeddedImages:
        """Embeds images, and counts those that cannot be read."""
        import torch

        from smallcap.model.clip_encoder import normalise_pixels

        crops = []
        for uri, data in zip(uris, fetch_objects(uris).data, strict=True):
            try:
                if isinstance(data, RowError):
                    raise data
                crops.append(crop_pixels(decode_image(data, where=uri), self._encoder.preprocessing))
            except RowError:
                continue
        vectors = np.zeros((0, self._encoder.dim), np.float32)
        if crops:
            pixels = torch.from_numpy(np.stack(crops)).to(self._encoder.device)
            pixel_values = normalise_pixels(pixels, self._encoder.preprocessing, getattr(torch, self._dtype))
            vectors = self._encoder.encode_images(pixel_values).cpu().numpy()
        return EmbeddedImages(vectors, len(uris) - len(crops))


def plan_image_queries(sources: Sequence[str], count: int) -> list[list[str]]:
    """Lists up to `count` images, evenly spaced over all, in work items.

    Args:
        sources: Folders, prefixes, globs, image files, or lists of URIs.
        count: The most images to take; each is taken once, in the order of ids.

    Raises:
        ConfigError: There are too few images, or some are in tars or Parquet files.
        SchemaError: A list is damaged, or lacks the column of URIs.
        StorageError: A source does not exist.
    """
    listed = ImageSources(sources, InputConfig())
    with storage.scratch_folder() as scratch:
        tables = list(unique_images(sort_images(listed.tables(), scratch), Duplicates(scratch / "aside.arrow")))
    packed = [*listed.tars, *listed.parquet]
    if packed:
        raise ConfigError(
            "Calibration images cannot be in tars or Parquet files.",
            where=packed[0],
            remedy="Give image files, or a list of URIs.",
        )
    if not tables:
        raise no_images(sources)
    images = pa.concat_tables(tables)
    if images.num_rows < LEAST_IMAGES:
        raise ConfigError(
            "There are too few calibration images.",
            where=", ".join(sources),
            expected=f"at least {LEAST_IMAGES}, better 2,000",
            found=str(images.num_rows),
            remedy="Give more images, or none: captions then stand in for them.",
        )
    rows = np.unique(np.linspace(0, images.num_rows - 1, count).astype(np.int64))
    uris = images["image_uri"].take(rows).to_pylist()
    return [uris[start : start + IMAGES_PER_TASK] for start in range(0, len(uris), IMAGES_PER_TASK)]
