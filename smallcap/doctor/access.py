"""Checks the model, the index and the encoder that a run is to use: that they are there, whole, and fit each other."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from smallcap import storage
from smallcap.doctor.report import Finding, attempt, fail, ok, warn
from smallcap.errors import CheckpointError
from smallcap.index.manifest import IndexManifest, load_manifest
from smallcap.index.node_cache import missing_files
from smallcap.phrasing import describe_count, describe_gb

ENCODER_REMEDY = (
    "Give --retrieval-encoder a CLIP that can be reached from here: demo, hf:ID-PATH-OR-URI, or "
    "open_clip:MODEL/PRETRAINED-PATH-OR-URI."
)
_CACHE_REMEDY = "Name a folder that can be written, on a disk with room, by --cache-dir."
_SHOWN = 3  # files that a line names


def check_model(model: str, cache_dir: str = storage.DEFAULT_CACHE_DIR) -> Iterator[Finding]:
    """Loads a checkpoint on the CPU, and names its weights by their checksum.

    Args:
        model: The checkpoint.
        cache_dir: Folder for a copy of a remote one.

    Raises:
        CheckpointError: It cannot be found or loaded.
    """
    from smallcap.model.checkpoint import load_checkpoint, tokenizer_source
    from smallcap.model.prompt import load_tokenizer

    start = time.monotonic()
    loaded = load_checkpoint(model, cache_dir=cache_dir)
    load_tokenizer(tokenizer_source(model, cache_dir), cache_dir)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    seconds = time.monotonic() - start
    yield ok("model", f"{loaded.model_id}: {parameters / 1e6:,.1f} million parameters, loaded in {seconds:.1f} s")


def check_encoder(spec: str, cache_dir: str = storage.DEFAULT_CACHE_DIR) -> Iterator[Finding]:
    """Looks for a retrieval encoder, and names its weights by their checksum.

    Args:
        spec: Its spec.
        cache_dir: Folder for a copy of a remote one.

    Raises:
        RunError: It cannot be found.
    """
    from smallcap.model.encoder_spec import resolve_encoder_identity

    identity = resolve_encoder_identity(spec, cache_dir)
    yield ok("retrieval encoder", f"{spec}: weights {identity.weights_sha256[:12]}, {identity.dim} dimensions")


def check_index(index: str, model: str, retrieval_encoder: str | None, cache_dir: str) -> Iterator[Finding]:
    """Checks an index's manifest, its files, its encoder, and the disk that copies of it need.

    Args:
        index: URI of a published index.
        model: The checkpoint to use it with.
        retrieval_encoder: Spec of the retrieval encoder; by default the one that the index names.
        cache_dir: Folder for copies of remote indexes, and for what is known of local ones.

    Raises:
        RunError: There is no index.
    """
    manifest = load_manifest(index)
    size = sum(entry.bytes for entry in manifest.files)
    found = f"{describe_count(manifest.ntotal, 'caption')} in version {manifest.index_id}, {describe_gb(size)}"
    wrong = [entry.file for entry in manifest.files if storage.size(storage.join(index, entry.file)) != entry.bytes]
    if wrong:
        yield fail(
            "index",
            f"{found}; {describe_count(len(wrong), 'file')} missing or of another size: {', '.join(wrong[:_SHOWN])}",
            "Copy the index again from where it was published, or rebuild it.",
        )
    else:
        yield ok("index", found)
    yield from attempt("index cache", lambda: [_check_cache(index, manifest, cache_dir)], _CACHE_REMEDY)
    encoders = (index, manifest, model, retrieval_encoder, cache_dir)
    yield from attempt("index encoder", lambda: [_compare_encoders(*encoders)], ENCODER_REMEDY)


def _check_cache(index: str, manifest: IndexManifest, cache_dir: str) -> Finding:
    """Compares the free disk with what is still to be downloaded."""
    folder = Path(cache_dir).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return fail("index cache", f"{there} is not a folder that can be written", _CACHE_REMEDY)
    if storage.is_local(index):
        return ok("index cache", "a local index is used in place")
    needed = sum(entry.bytes for entry in missing_files(index, manifest, cache_dir))
    free = shutil.disk_usage(there).free
    found = f"{describe_gb(needed)} to download to {cache_dir}, {describe_gb(free)} free"
    if needed > free:
        return fail("index cache", found, "Free space, or name a folder on a larger disk by --cache-dir.")
    return ok("index cache", found)


def _compare_encoders(
    index: str, manifest: IndexManifest, model: str, retrieval_encoder: str | None, cache_dir: str
) -> Finding:
    """Compares the index's encoder with the one that would make the queries, and with the checkpoint's."""
    from smallcap.model.checkpoint import load_config
    from smallcap.model.encoder_spec import resolve_encoder_identity
    from smallcap.model.files import resolve_folder

    subject = "index encoder"
    identity = resolve_encoder_identity(retrieval_encoder or manifest.encoder.spec, cache_dir)
    manifest.check_encoder(identity, where=index)
    fits = f"{identity.spec}, as the index was built"
    try:
        named = load_config(resolve_folder(model, "smallcap", cache_dir)).retrieval_encoder
    except CheckpointError:  # as the model's own line says
        return warn(subject, f"{fits}; not compared with the model's, because of model", "Mend model first.")
    if named and named != identity.spec:  # by name: to compare weights would download the other encoder
        return warn(
            subject,
            f"the index was built with {identity.spec}, and the model was trained with {named}",
            "The model sees captions chosen in another way than in training; build the index with its encoder.",
        )
    return ok(subject, fits)
