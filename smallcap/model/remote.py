"""Copies models from object stores and other remote places to the node, once for all its processes.

A version of a model is its place with the names, sizes and tags (ETag, generation, time) of its files. Each has a
folder of its own in the node's cache, so that a model that is replaced never mixes with its successor. The cache
itself is that of indexes (`smallcap.index.node_cache`): one process at a time downloads, files arrive by rename, and
what was touched since is checked again. Nothing that is downloaded is loaded or run here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from smallcap import storage
from smallcap.errors import CheckpointError, StorageError
from smallcap.index.node_cache import MODELS_FOLDER, CachedFile, NodeCache
from smallcap.object_state import VERSIONS
from smallcap.phrasing import describe_count
from smallcap.redaction import hide_secrets
from smallcap.translated import translated

CONFIG_FILE = "config.json"
# Weights and text files only: no pickled optimizers, no code.
WANTED = ("*.json", "*.txt", "*.safetensors", "*.model", "pytorch_model*.bin", "open_clip_pytorch_model.bin")
_TAGS = (*VERSIONS, "content_md5", "blob_id", "xet_hash", "oid", "version_id", "created")
_LISTINGS = 3  # a model that is being written meanwhile is listed so often
_SHOWN = 8  # names in a message
_TOKENIZERS = ("tokenizer.json", "vocab.json")  # one of them lies in a folder that has no model
_copied: dict[Path, str] = {}  # copies that this process has asked for, and where they are from


@dataclass(frozen=True)
class _Listed:
    """A file as its store lists it: what tells its versions apart."""

    name: str
    uri: str
    bytes: int  # 0 where the store does not tell
    tags: dict[str, str]

    @classmethod
    def of(cls, entry: Mapping[str, Any], folder: str) -> Self:
        """Returns an entry of fsspec's; a name is the last part of a path, so it leads nowhere else."""
        name = str(entry["name"]).rstrip("/").rpartition("/")[2]
        tags = {tag: str(entry[tag]) for tag in _TAGS if entry.get(tag) is not None}
        return cls(name, storage.join(folder, name), int(entry.get("size") or 0), tags)


def fetch_folder(uri: str, cache_dir: str) -> Path:
    """Returns the local copy of a remote model's folder; downloads what this node lacks.

    Args:
        uri: A folder or prefix at any place that `smallcap.storage` reads.
        cache_dir: The node's cache folder.

    Raises:
        CheckpointError: There is no model, or it is replaced again and again while it is copied.
        StorageError: The store fails, or the cache folder cannot be written or has no room.
    """
    uri = uri.rstrip("/")
    files = _fetch(uri, cache_dir, _list_folder)
    _copied[files[0].parent] = uri
    return files[0].parent


def fetch_file(uri: str, cache_dir: str) -> Path:
    """Returns the local copy of a remote file of weights; see `fetch_folder`."""
    (file,) = _fetch(uri, cache_dir, _look_at_file)
    return file


def shown_place(path: Path) -> str:
    """Returns a model's folder or file for a message: where it is from, if it is a copy that this process asked for."""
    if path in _copied:
        return _copied[path]
    return storage.join(_copied[path.parent], path.name) if path.parent in _copied else str(path)


def _fetch(uri: str, cache_dir: str, look: Callable[[str], list[_Listed]]) -> list[Path]:
    """Returns the local copies of what `look` lists."""
    cache = NodeCache(Path(cache_dir).expanduser(), _check_copy)
    listed = look(uri)
    for _ in range(_LISTINGS):
        digest = hashlib.sha256(json.dumps([uri, *map(asdict, listed)], sort_keys=True).encode()).hexdigest()[:32]
        files = [CachedFile(f"{MODELS_FOLDER}/{digest}/{one.name}", one.uri, one.bytes) for one in listed]
        paths = [cache.root / file.file for file in files]
        if all(cache.has(file) for file in files):
            return paths
        cache.fetch(files, {file.file for file in files})
        before, listed = listed, look(uri)
        if listed == before:
            return paths
    raise CheckpointError(
        "The model changes while it is copied to this node.",
        where=uri,
        found=f"other files after each of {_LISTINGS} copies",
        remedy="Wait until whoever writes it is done, or give the place of a finished model.",
    )


def _list_folder(uri: str) -> list[_Listed]:
    fs, path = storage.filesystem(uri)
    try:
        with translated(uri, "read this model"):
            entries = fs.ls(path, detail=True)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):  # no bucket, no credentials …
            raise
        entries = []
    found = sorted((_Listed.of(entry, uri) for entry in entries if entry["type"] == "file"), key=lambda one: one.name)
    wanted = [one for one in found if any(fnmatch(one.name, pattern) for pattern in WANTED)]
    if any(one.name.endswith(".safetensors") for one in wanted):
        wanted = [one for one in wanted if not one.name.endswith(".bin")]  # the same weights
    if not any(one.name.endswith((CONFIG_FILE, *_TOKENIZERS)) for one in wanted):
        names = ", ".join(one.name for one in found[:_SHOWN])
        others = f" and {describe_count(len(found) - _SHOWN, 'other')}" if len(found) > _SHOWN else ""
        raise CheckpointError(
            "There is no model in this folder.",
            where=uri,
            expected=f"{CONFIG_FILE} and a file of weights, such as model.safetensors",
            found=names + others or "no file, or no such folder",
            remedy="Give the folder in which these files lie; `smallcap train` writes them to OUT/model.",
        )
    return wanted


def _look_at_file(uri: str) -> list[_Listed]:
    fs, path = storage.filesystem(uri)
    with translated(uri, "read these weights"):
        return [_Listed.of(fs.info(path), uri.rpartition("/")[0])]


def _check_copy(path: Path, file: CachedFile) -> str:
    """Checks a copy's size, and its sha256 where it is known, and returns its sha256.

    Raises:
        CheckpointError: A check fails.
    """
    size, sha256 = path.stat().st_size, storage.sha256_file(path)
    if (file.bytes and size != file.bytes) or file.sha256 not in (None, sha256):
        raise CheckpointError(
            "The copy of a model's file is damaged.",
            where=file.uri,
            expected=f"{file.bytes:,} bytes" + (f", sha256 {file.sha256}" if file.sha256 else ""),
            found=f"{size:,} bytes, sha256 {sha256}",
            remedy="Run the same command again; if that fails as well, copy the model there again.",
        )
    return sha256


def shown_name(uri: str) -> str:
    """Returns the name of a remote model in ids and records."""
    return hide_secrets(uri.rstrip("/"))
