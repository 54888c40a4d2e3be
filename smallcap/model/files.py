"""Finds the local files of a model (`demo`, a folder, a URI, or a Hugging Face id) and of GPT-2's tokenizer.

It downloads only what a URI or a hub id names, and never loads or runs what it finds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from smallcap.errors import CheckpointError
from smallcap.model.remote import WANTED, fetch_folder, shown_name, shown_place
from smallcap.storage import DEFAULT_CACHE_DIR, absolute, is_local, sha256_file

DEMO = "demo"
GPT2 = "gpt2"


def demo_captions() -> Iterator[str]:
    """Yields the captions of the demo's training domains.

    Raises:
        CheckpointError: This installation has no demo files.
    """
    with (demo_folder() / "captions.csv").open(newline="") as file:
        yield from (row["caption"] for row in csv.DictReader(file))


def demo_folder() -> Path:
    """Returns the folder of the demo's model, images and captions.

    Raises:
        CheckpointError: This installation has no demo files.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_demo", package.parent / "demo"):  # a wheel's copy, or the source checkout
        if (folder / "model").is_dir():
            return folder
    raise CheckpointError(
        "This installation has no demo files.",
        where=str(package.parent / "demo"),
        remedy="Install smallcap from a checkout of its repository, or from its wheel.",
    )


def tokenizer_folder(source: str, cache_dir: str = DEFAULT_CACHE_DIR) -> Path:
    """Returns the local folder of a tokenizer; like `resolve_folder`, but GPT-2's comes with this package.

    Args:
        source: `demo`, `gpt2`, a folder, a URI, or a Hugging Face id.
        cache_dir: This node's cache folder, for copies of what is remote.

    Raises:
        CheckpointError: There is no such folder, or the hub id cannot be reached.
        StorageError: The URI's store fails.
    """
    if source == GPT2:
        return Path(__file__).parents[1] / "gpt2_tokenizer"
    return resolve_folder(source, "smallcap", cache_dir)


def resolve_folder(source: str, demo_model: str, cache_dir: str = DEFAULT_CACHE_DIR) -> Path:
    """Returns the local folder of a model; downloads it if `source` is a URI or a hub id.

    Args:
        source: `demo`, a folder, a URI such as `s3://bucket/model`, or a Hugging Face id such as
            `openai/clip-vit-base-patch32`.
        demo_model: Name of the folder in `demo/model/` that `demo` stands for.
        cache_dir: This node's cache folder, for copies of what a URI names; hub ids have the hub's own.

    Raises:
        CheckpointError: There is no such folder, or the hub id cannot be reached.
        StorageError: The URI's store fails.
    """
    if source == DEMO:
        return demo_folder() / "model" / demo_model
    if not is_local(source):
        return fetch_folder(source, cache_dir)
    folder = Path(absolute(source) if "://" in source else source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            "There is no such model folder.",
            where=source,
            expected="an existing folder, a URI, or a hub id",
            found="none",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            "The model is neither a folder here nor reachable on the Hugging Face hub.",
            where=source,
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="Check the name and the network; HF_TOKEN for private models, HF_HOME for a shared cache.",
        ) from error


def weights_file(folder: Path) -> Path:
    """Returns a model folder's weights file, safetensors before `.bin`.

    Raises:
        CheckpointError: There is none, or the weights are split into several files.
    """
    names = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    present = sorted(path.name for path in folder.iterdir())
    raise CheckpointError(
        "The model folder has no weights file.",
        where=shown_place(folder),
        expected=" or ".join(names),
        found=", ".join(present),
    )


def checkpoint_id(source: str, cache_dir: str = DEFAULT_CACHE_DIR) -> str:
    """Returns a checkpoint's id: its name and the first digits of its weights' sha256; the weights are not loaded.

    Raises:
        CheckpointError: It cannot be found, or is not a SmallCap checkpoint.
        StorageError: The store that has it fails.
    """
    folder = resolve_folder(source, "smallcap", cache_dir)
    read_checkpoint_config(folder)
    return named_by_weights(source, folder)


def checkpoint_sha256(source: str, cache_dir: str = DEFAULT_CACHE_DIR) -> str:
    """Returns the hexadecimal sha256 of a checkpoint's weights file; errors are those of `checkpoint_id`."""
    return weights_sha256(weights_file(resolve_folder(source, "smallcap", cache_dir)))


def joined_model_id(vision_encoder: str, decoder: str, cache_dir: str = DEFAULT_CACHE_DIR) -> str:
    """Returns an id of two models joined: their names and the first digits of their weights' sha256.

    Raises:
        CheckpointError: One of them cannot be found.
        StorageError: The store that has it fails.
    """
    kinds = ((vision_encoder, "clip"), (decoder, "smallcap"))
    folders = [(source, resolve_folder(source, kind, cache_dir)) for source, kind in kinds]
    return " + ".join(named_by_weights(source, folder) for source, folder in folders)


def named_by_weights(source: str, folder: Path) -> str:
    """Returns the id of a model that is in a folder, as `resolve_folder` found it."""
    # `demo` is not a folder's name, wherever a command is given
    is_folder = source != DEMO and is_local(source) and ("://" in source or Path(source).is_dir())
    name = folder.name if is_folder else source if is_local(source) else shown_name(source)
    return f"{name}@{weights_sha256(weights_file(folder))[:12]}"


def weights_sha256(path: Path) -> str:
    """Returns the hexadecimal sha256 of a weights file; a process reads a file once, as long as it is untouched."""
    status = path.stat()
    return _sha256_of(path, status.st_ino, status.st_size, status.st_ctime_ns)


@cache
def _sha256_of(path: Path, *stamp: int) -> str:
    return sha256_file(path)


def read_checkpoint_config(folder: Path) -> dict[str, Any]:
    """Reads the `config.json` of a SmallCap checkpoint.

    Raises:
        CheckpointError: It is missing, malformed, or that of another kind of model.
    """
    path = folder / "config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        kind = values["model_type"]
    except FileNotFoundError as error:
        raise CheckpointError("The checkpoint has no config.json.", where=shown_place(folder)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "The checkpoint's config.json is malformed.",
            where=shown_place(path),
            found=f"{type(error).__name__}: {error}",
        ) from error
    if kind != "smallcap":
        where, found = shown_place(path), str(kind)
        raise CheckpointError("This is not a SmallCap checkpoint.", where=where, expected="smallcap", found=found)
    return values
