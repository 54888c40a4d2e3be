"""Finds the local files of a model (`demo`, a folder, or a Hugging Face id) and of GPT-2's tokenizer.

It downloads only what a hub id names, and never loads or runs what it finds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from smallcap.errors import CheckpointError
from smallcap.storage import sha256_file

DEMO = "demo"
GPT2 = "gpt2"
# Weights and text files only: no pickled optimizers, no code.
_WANTED = ["*.json", "*.txt", "*.safetensors", "*.model", "pytorch_model*.bin", "open_clip_pytorch_model.bin"]


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


def tokenizer_folder(source: str) -> Path:
    """Returns the local folder of a tokenizer; like `resolve_folder`, but GPT-2's comes with this package.

    Args:
        source: `demo`, `gpt2`, a folder, or a Hugging Face id.

    Raises:
        CheckpointError: There is no such folder, or the hub id cannot be reached.
    """
    if source == GPT2:
        return Path(__file__).parents[1] / "gpt2_tokenizer"
    return resolve_folder(source, demo_model="smallcap")


def resolve_folder(source: str, demo_model: str) -> Path:
    """Returns the local folder of a model; downloads it if `source` is a hub id.

    Args:
        source: `demo`, a folder, or a Hugging Face id such as `openai/clip-vit-base-patch32`.
        demo_model: Name of the folder in `demo/model/` that `demo` stands for.

    Raises:
        CheckpointError: There is no such folder, or the hub id cannot be reached.
    """
    if source == DEMO:
        return demo_folder() / "model" / demo_model
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            "There is no such model folder.", where=source, expected="an existing folder, or a hub id", found="neither"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=_WANTED))
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
        where=str(folder),
        expected=" or ".join(names),
        found=", ".join(present),
    )


def checkpoint_id(source: str) -> str:
    """Returns a checkpoint's id: its name and the first digits of its weights' sha256; the weights are not loaded.

    Raises:
        CheckpointError: It cannot be found, or is not a SmallCap checkpoint.
    """
    folder = resolve_folder(source, demo_model="smallcap")
    read_checkpoint_config(folder)
    return named_by_weights(source, folder)


def joined_model_id(vision_encoder: str, decoder: str) -> str:
    """Returns an id of two models joined: their names and the first digits of their weights' sha256.

    Raises:
        CheckpointError: One of them cannot be found.
    """
    folders = (vision_encoder, resolve_folder(vision_encoder, "clip")), (decoder, resolve_folder(decoder, "smallcap"))
    return " + ".join(named_by_weights(source, folder) for source, folder in folders)


def named_by_weights(source: str, folder: Path) -> str:
    """Returns the id of a model that is in a folder, as `resolve_folder` found it."""
    is_folder = source != DEMO and Path(source).is_dir()  # `demo` is not a folder's name, wherever a command is given
    name = folder.name if is_folder else source
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
        raise CheckpointError("The checkpoint has no config.json.", where=str(folder)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "The checkpoint's config.json is malformed.", where=str(path), found=f"{type(error).__name__}: {error}"
        ) from error
    if kind != "smallcap":
        where, found = str(path), str(kind)
        raise CheckpointError("This is not a SmallCap checkpoint.", where=where, expected="smallcap", found=found)
    return values
