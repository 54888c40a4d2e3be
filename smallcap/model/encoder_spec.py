"""What the spec of a retrieval encoder names: its identity and how it wants images, known before a model is loaded.

A retrieval encoder comes from transformers (`hf:ID-OR-PATH`) or from open_clip (`open_clip:MODEL/PRETRAINED-OR-PATH`,
`open_clip:hf-hub:ID` or `open_clip:local-dir:FOLDER`); a path may be a URI. `demo` is the demo's encoder. Its identity,
the checksum of its weights, ties an index to the only encoder whose queries it can answer.

This module does not import torch, so that a misspelt encoder is told at once. open_clip, which does, is imported only
where its weights are looked for; the names that it knows are read off its files.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from smallcap.config import DecodeMode
from smallcap.errors import CheckpointError, ConfigError
from smallcap.images.crops import CropPlan
from smallcap.images.decode import Preprocessing
from smallcap.index.manifest import EncoderIdentity
from smallcap.model.clip_config import read_clip_config
from smallcap.model.files import DEMO, read_checkpoint_config, resolve_folder, weights_file, weights_sha256
from smallcap.model.remote import fetch_file, shown_place
from smallcap.storage import DEFAULT_CACHE_DIR, is_local

_LOCAL_FOLDER = "local-dir:"  # how open_clip names one, which smallcap lets be remote as well


def resolve_encoder_identity(spec: str, cache_dir: str = DEFAULT_CACHE_DIR) -> EncoderIdentity:
    """Returns the identity of a retrieval encoder without loading its model.

    Args:
        spec: The spec.
        cache_dir: This node's cache folder, for copies of what is remote.

    Raises:
        ConfigError: The spec has no known form, or open_clip does not know the names in it.
        CheckpointError: What it names cannot be found.
        StorageError: The store that has it fails.
    """
    backend, name, pretrained = local_encoder(spec, cache_dir)
    if backend == "hf":
        _, _, dim = read_clip_config(Path(name))
        weights = weights_file(Path(name))
    else:
        dim = open_clip_config(name)["embed_dim"]
        weights = _open_clip_weights(name, pretrained, spec)
    return EncoderIdentity(spec=spec, weights_sha256=weights_sha256(weights), dim=dim)


def load_preprocessing(spec: str, cache_dir: str = DEFAULT_CACHE_DIR) -> Preprocessing:
    """Returns how a retrieval encoder wants its images prepared, without loading its model.

    Arguments and errors are those of `resolve_encoder_identity`.
    """
    backend, name, pretrained = local_encoder(spec, cache_dir)
    if backend == "open_clip":
        return open_clip_preprocessing(name, pretrained)
    vision, _, _ = read_clip_config(Path(name))
    return Preprocessing(size_px=vision.image_size)


def load_crop_plan(
    model: str, retrieval_encoder: str | None, decode: DecodeMode = "exact", cache_dir: str = DEFAULT_CACHE_DIR
) -> CropPlan:
    """Returns the crops that a checkpoint and a retrieval encoder need, without loading them.

    Raises:
        CheckpointError: One of them cannot be found, or is malformed.
        StorageError: The store that has it fails.
    """
    folder = resolve_folder(model, "smallcap", cache_dir)
    try:
        encoder = read_checkpoint_config(folder)["encoder"]
        vision = vision_preprocessing(encoder.get("vision_config") or encoder)
    except (AttributeError, KeyError) as error:
        raise CheckpointError(
            "The checkpoint's config.json is malformed.",
            where=shown_place(folder / "config.json"),
            found=f"{type(error).__name__}: {error}",
        ) from error
    retrieval = load_preprocessing(retrieval_encoder, cache_dir) if retrieval_encoder else None
    return CropPlan.of(vision, retrieval, decode)


def local_encoder(spec: str, cache_dir: str) -> tuple[Literal["hf", "open_clip"], str, str | None]:
    """Does what `check_encoder_spec` does, and names local copies of what is remote, for `hf` always a folder.

    Raises:
        ConfigError: As `check_encoder_spec`.
        CheckpointError, StorageError: What is remote cannot be fetched.
    """
    backend, name, pretrained = check_encoder_spec(spec)
    if backend == "hf":
        return backend, str(resolve_folder(name, "clip", cache_dir)), None
    if pretrained is not None and not is_local(pretrained):
        return backend, name, str(fetch_file(pretrained, cache_dir))
    place = name.removeprefix(_LOCAL_FOLDER)
    if not is_local(place):
        name = f"{_LOCAL_FOLDER}{resolve_folder(place, 'clip', cache_dir)}"
    return backend, name, pretrained


def check_encoder_spec(spec: str) -> tuple[Literal["hf", "open_clip"], str, str | None]:
    """Splits a spec into backend, model name and open_clip's pretrained tag or path, and checks what open_clip knows.

    Raises:
        ConfigError: The spec has no known form, or names an architecture or weights that open_clip does not know.
    """
    backend, name, pretrained = _split(spec)
    if backend == "open_clip" and pretrained is not None:
        open_clip_config(name)
        tags = _pretrained_tags().get(name, [])
        is_file = not is_local(pretrained) or Path(pretrained).is_file()  # what is remote is looked at when fetched
        if pretrained.lower().replace("-", "_") not in tags and not is_file:
            raise ConfigError(
                "The pretrained weights are neither a tag of this architecture nor a file.",
                where=spec,
                expected=", ".join(tags) or "a file",
                found=pretrained,
                remedy=_nearest(pretrained, tags, f"open_clip:{name}/"),
            )
    return backend, name, pretrained


def _split(spec: str) -> tuple[Literal["hf", "open_clip"], str, str | None]:
    if spec == DEMO:
        return "hf", DEMO, None
    backend, colon, name = spec.partition(":")
    if colon and name and backend == "hf":
        return "hf", spec if name.startswith("//") else name, None  # hf://USER/NAME is a place on the Hub
    if colon and name and backend == "open_clip":
        if name.startswith(("hf-hub:", _LOCAL_FOLDER)):
            return "open_clip", name, None
        model, slash, pretrained = name.partition("/")
        if slash and pretrained:
            return "open_clip", model, pretrained
    raise ConfigError(
        "This is not a retrieval encoder spec.",
        where=spec,
        expected="demo, hf:ID-PATH-OR-URI, or open_clip:MODEL/PRETRAINED-PATH-OR-URI",
        remedy="For the paper's encoder write open_clip:RN50x64/openai.",
    )


def vision_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Returns how a transformers CLIP wants its images prepared, from its vision config."""
    return Preprocessing(size_px=config.get("image_size", 224))


def open_clip_preprocessing(name: str, pretrained: str | None = None) -> Preprocessing:
    """Returns how an open_clip architecture with a pretrained tag wants images prepared."""
    values = _open_clip_tag(name, pretrained)
    if ":" in name:
        values = _read_json(_open_clip_folder(name) / "open_clip_config.json").get("preprocess_cfg", {})
    size = open_clip_config(name)["vision_cfg"].get("image_size", 224)
    default = Preprocessing(size if isinstance(size, int) else size[0], crop_rounding="nearest")
    return replace(default, mean=tuple(values.get("mean") or default.mean), std=tuple(values.get("std") or default.std))


def _open_clip_tag(name: str, pretrained: str | None) -> dict[str, Any]:
    """Returns open_clip's registry entry of a pretrained tag; empty for a path or a schema name."""
    from open_clip.pretrained import get_pretrained_cfg

    return get_pretrained_cfg(name, pretrained) or {} if pretrained else {}


def uses_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Says whether open_clip must be told to build an architecture with QuickGELU, OpenAI's activation.

    Its registry says so for a tag. A file does not tell. If all known weights of the architecture are OpenAI's, as
    those of RN50x64 are, it holds such weights; otherwise the name decides, as in `RN50-quickgelu`.
    """
    if tag := _open_clip_tag(name, pretrained):
        return bool(tag.get("quick_gelu", False))
    known = _pretrained_tags()
    return pretrained is not None and name in known and known[name] == known.get(f"{name}-quickgelu")


def open_clip_config(name: str) -> dict[str, Any]:
    """Returns an open_clip architecture's config.

    Raises:
        ConfigError: open_clip does not know it.
        CheckpointError: A folder or hub id lacks it.
    """
    if ":" in name:
        config: dict[str, Any] = _read_json(_open_clip_folder(name) / "open_clip_config.json")["model_cfg"]
        return config
    files = {path.stem: path for path in (_open_clip_package() / "model_configs").glob("*.json")}
    config = _read_json(files[name]) if name in files else {}
    if not config.keys() >= {"embed_dim", "vision_cfg", "text_cfg"}:
        raise ConfigError(
            "open_clip has no such architecture.",
            where=name,
            expected="one of those that open_clip.list_models() names",
            remedy=_nearest(name, list(files), ""),
        )
    return config


@cache
def _pretrained_tags() -> Mapping[str, Sequence[str]]:
    """Returns open_clip's pretrained tags by architecture, as its source declares them."""
    try:
        source = (_open_clip_package() / "pretrained.py").read_text(encoding="utf-8")
        return parse_pretrained_tags(source)
    except (SyntaxError, KeyError, AttributeError):  # another release may declare them in another way
        from open_clip.pretrained import list_pretrained

        tags: dict[str, list[str]] = {}
        for name, tag in list_pretrained():
            tags.setdefault(name, []).append(tag)
        return tags


def parse_pretrained_tags(source: str) -> dict[str, list[str]]:
    """Reads `_PRETRAINED = {NAME: dict(TAG=_pcfg(…), …), …}`, whose values may be names of such dicts.

    Raises:
        SyntaxError, KeyError, AttributeError: The source is of another form.
    """
    assigned: dict[str, Any] = {
        target.id: node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    tags: dict[str, list[str]] = {}
    for key, value in zip(assigned["_PRETRAINED"].keys, assigned["_PRETRAINED"].values, strict=True):
        entries = (assigned[value.id] if isinstance(value, ast.Name) else value).keywords
        tags[key.value] = [entry.arg for entry in entries]
        quick = [entry.arg for entry in entries if any(option.arg == "quick_gelu" for option in entry.value.keywords)]
        if quick:
            tags[f"{key.value}-quickgelu"] = quick
    return tags


def _open_clip_package() -> Path:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ConfigError("open_clip is not installed.", remedy="Install it: pip install open_clip_torch.")
    return Path(spec.origin).parent


def _nearest(name: str, known: Sequence[str], before: str) -> str:
    nearest = [f"{before}{match}" for match in get_close_matches(name, known)]
    return f"Did you mean {' or '.join(nearest)}?" if nearest else ""


def _open_clip_folder(name: str) -> Path:
    """Returns the folder of a `hf-hub:` or `local-dir:` name."""
    return resolve_folder(name.partition(":")[2], demo_model="clip")


def _open_clip_weights(name: str, pretrained: str | None, spec: str) -> Path:
    """Returns the weights file of an open_clip model, downloaded if necessary."""
    if pretrained is None:
        return weights_file(_open_clip_folder(name))
    from open_clip.pretrained import download_pretrained

    tag = _open_clip_tag(name, pretrained)
    if not tag:
        return Path(pretrained)
    try:
        return Path(download_pretrained(tag))
    except Exception as error:  # those of huggingface_hub, urllib and open_clip have no common base
        raise CheckpointError(
            "open_clip's pretrained weights cannot be downloaded.",
            where=spec,
            found=f"{type(error).__name__}: {error}",
            remedy="Check the network, or give a local weights file: open_clip:MODEL/PATH.",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(
            "The encoder's config cannot be read.", where=shown_place(path), found=str(error)
        ) from error
    return values
