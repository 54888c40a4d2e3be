"""The images of a run: from folders, prefixes and lists of URIs to one table of ids and URIs.

It lists and never opens an image. An id is unique in a run: the path below its folder, or the list's id column, or the
URI where a list has none.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from smallcap import storage
from smallcap.config import InputConfig
from smallcap.errors import ConfigError, SchemaError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
IMAGE_TABLE = pa.schema([pa.field("image_id", pa.string()), pa.field("image_uri", pa.string())])

_LIST_READERS: dict[str, Callable[[bytes], pa.Table]] = {
    ".parquet": lambda data: pq.read_table(io.BytesIO(data)),
    ".csv": lambda data: _read_csv(data, ","),
    ".tsv": lambda data: _read_csv(data, "\t"),
    ".jsonl": lambda data: pa.json.read_json(io.BytesIO(data)),
    ".txt": lambda data: pa.table({"image_uri": [line for line in data.decode().splitlines() if line.strip()]}),
}


def list_images(sources: Sequence[str], config: InputConfig) -> pa.Table:
    """Lists the images of all sources, sorted by id, each once.

    Args:
        sources: Folders, prefixes, image files, or lists of URIs (.parquet, .csv, .tsv, .jsonl, .txt).
        config: The columns of lists.

    Returns:
        `image_id` and `image_uri` (string). An image that is named twice is there once.

    Raises:
        ConfigError: There is no image, or one id stands for two images.
        SchemaError: A list has not the column that holds its URIs.
        StorageError: A source does not exist.
    """
    tables = [_list_source(source, config) for source in sources]
    images = pa.concat_tables(tables).group_by(["image_id", "image_uri"]).aggregate([]).sort_by("image_id")
    if images.num_rows == 0:
        raise ConfigError(
            "There are no images.",
            where=", ".join(sources),
            expected=f"files ending in {' '.join(IMAGE_SUFFIXES)}",
            remedy="Check the path; name other files in a list of URIs.",
        )
    ids = images["image_id"].combine_chunks()
    same = pc.equal(ids[1:], ids[:-1])
    if images.num_rows > 1 and pc.any(same).as_py():
        row = pc.index(same, True).as_py()
        raise ConfigError(
            "One image id stands for two images.",
            where=ids[row].as_py(),
            found=f"{images['image_uri'][row]} and {images['image_uri'][row + 1]}",
            remedy=f"Give the list a column {config.id_column} of unique ids, or caption the folders in separate runs.",
        )
    return images.combine_chunks()


def _list_source(source: str, config: InputConfig) -> pa.Table:
    suffix = "." + source.rsplit(".", 1)[-1].lower()
    if suffix in _LIST_READERS and not storage.is_folder(source):
        return _read_list(source, suffix, config)
    root = storage.absolute(source)
    uris = storage.list_files(root, () if root.lower().endswith(IMAGE_SUFFIXES) else IMAGE_SUFFIXES)
    ids = [uri.removeprefix(root).lstrip("/") or uri.rsplit("/", 1)[-1] for uri in uris]
    return pa.table({"image_id": ids, "image_uri": uris}, schema=IMAGE_TABLE)


def _read_list(source: str, suffix: str, config: InputConfig) -> pa.Table:
    """Reads one list; relative URIs in it are relative to the list's folder."""
    try:
        table = _LIST_READERS[suffix](storage.read_bytes(source))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SchemaError("The list of images cannot be read.", where=source, found=str(error)) from error
    column = "image_uri" if suffix == ".txt" else config.image_column
    if column not in table.column_names:
        raise SchemaError(
            "The list of images has no such column.",
            where=source,
            expected=column,
            found=", ".join(table.column_names),
            remedy="Name the column: --set input.image_column=NAME.",
        )
    uris = table[column].cast(pa.string())
    if uris.null_count:
        row = pc.index(uris.is_null(), True).as_py()
        raise SchemaError("A row of the list has no URI.", where=f"{source}, row {row + 1}", expected=column)
    given = uris.to_pylist()
    ids = table[config.id_column].cast(pa.string()).to_pylist() if config.id_column in table.column_names else given
    folder = storage.absolute(source).rsplit("/", 1)[0]
    absolute = [uri if _is_absolute(uri) else storage.join(folder, uri) for uri in given]
    return pa.table({"image_id": ids, "image_uri": absolute}, schema=IMAGE_TABLE)


def _is_absolute(uri: str) -> bool:
    return "://" in uri or uri.startswith("/")


def _read_csv(data: bytes, delimiter: str) -> pa.Table:
    return pa.csv.read_csv(
        io.BytesIO(data),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(strings_can_be_null=False),
    )
