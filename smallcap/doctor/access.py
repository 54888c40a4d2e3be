"""Checks the model and the index that a run is to use: that they are there, are whole, fit each other and the disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from smallcap import storage
from smallcap.doctor.report import Finding, fail, ok, warn
from smallcap.index.manifest import IndexManifest, load_manifest
from smallcap.index.node_cache import missing_files
from smallcap.phrasing import describe_count, describe_gb

_SHOWN = 3  # files that a line names


def check_model(model: str) -> Iterator[Finding]:
    """Loads a checkpoint on the CPU, and names its weights by their checksum.

    Raises:
        CheckpointError: It cannot be found or loaded.
    """
    from smallcap.model.checkpoint import load_checkpoint, tokenizer_source
    from smallcap.model.prompt import load_tokenizer

    start = time.monotonic()
    loaded = load_checkpoint(model)
    load_tokenizer(tokenizer_source(model))
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    seconds = time.monotonic() - start
    yield ok("model", f"{loaded.model_id}: {parameters / 1e6:,.1f} million parameters, loaded in {seconds:.1f} s")


def check_index(index: str, model: str, retrieval_encoder: str | None, cache_dir: str) -> Iterator[Finding]:
    """Checks an index's manifest, its files, its encoder, and the disk that copies of it need.

    Args:
        index: URI of a published index.
        model: The checkpoint to use it with.
        retrieval_encoder: Spec of the retrieval encoder; by default the one that the index names.
        cache_dir: Folder for copies of remote indexes.

    Raises:
        RunError: There is no index, or its encoder cannot be found or is another one.
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
    yield _check_cache(index, manifest, cache_dir)
    yield from _check_encoder(index, manifest, model, retrieval_encoder)


def _check_cache(index: str, manifest: IndexManifest, cache_dir: str) -> Finding:
    """Compares the free disk with what is still to be downloaded."""
    if storage.is_local(index):
        return ok("index cache", "a local index is used in place")
    needed = sum(entry.bytes for entry in missing_files(index, manifest, cache_dir))
    folder = Path(cache_dir).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{describe_gb(needed)} to download to {cache_dir}, {describe_gb(free)} free"
    if needed > free:
        return fail("index cache", found, "Free space, or name a folder on a larger disk by --cache-dir.")
    return ok("index cache", found)


def _check_encoder(index: str, manifest: IndexManifest, model: str, retrieval_encoder: str | None) -> Iterator[Finding]:
    """Compares the index's encoder with the one that would make the queries, and with the checkpoint's."""
    from smallcap.model.checkpoint import load_config
    from smallcap.model.clip_encoder import resolve_encoder_identity
    from smallcap.model.files import resolve_folder

    identity = resolve_encoder_identity(retrieval_encoder or manifest.encoder.spec)
    manifest.check_encoder(identity, where=index)
    named = load_config(resolve_folder(model, demo_model="smallcap")).retrieval_encoder
    if named and named != identity.spec:  # by name: to compare weights would download the other encoder
        yield warn(
            "index encoder",
            f"the index was built with {identity.spec}, and the model was trained with {named}",
            "The model sees captions chosen in another way than in training; build the index with its encoder.",
        )
        return
    yield ok("index encoder", f"{identity.spec}, as the index was built")
