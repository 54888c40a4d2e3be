"""All images of some sources as one table in memory: for samples, not for the millions of a run (see `work_list`)."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError
from smallcap.images.listing import no_images
from smallcap.images.sorting import Duplicates, sort_images, unique_images
from smallcap.images.sources import IMAGE_COLUMNS, ImageSources


def list_images(sources: Sequence[str], config: InputConfig) -> pa.Table:
    """Lists the images of all sources that have URIs of their own, sorted by id, each id once.

    Args:
        sources: Folders, prefixes, globs, image files, or lists of URIs.
        config: The columns of lists.

    Returns:
        `image_id` and `image_uri` (string).

    Raises:
        ConfigError: There is no image, or there are images in tars or Parquet files.
        SchemaError: A list is damaged, or lacks the column of URIs.
        StorageError: A source does not exist.
    """
    found = ImageSources(sources, config)
    with storage.scratch_folder() as scratch:
        tables = list(unique_images(sort_images(found.tables(), scratch), Duplicates()))
    packed = [*found.tars, *found.parquet]
    if packed:
        raise ConfigError(
            "Images in tars or Parquet files are not taken here.",
            where=packed[0],
            remedy="Give image files, or a list of URIs.",
        )
    if not tables:
        raise no_images(sources)
    return pa.concat_tables(tables).select(IMAGE_COLUMNS.names).combine_chunks()
