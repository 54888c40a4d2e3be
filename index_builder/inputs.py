"""What a build reads: dump files and stored indexes, the source files behind both, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from index_builder.dumps.buckets import DealTask, plan_buckets, plan_dealing
from index_builder.dumps.files import DumpScan
from index_builder.stored import DealStoredTask, Role, StoredIndex
from smallcap import storage
from smallcap.captions.rows import CaptionColumns
from smallcap.config import CleaningConfig, IndexConfig
from smallcap.errors import ConfigError, ManifestError
from smallcap.index.manifest import EncoderIdentity, IndexManifest, SourceEntry, load_manifest
from smallcap.model.encoder_spec import resolve_encoder_identity


@dataclass(frozen=True)
class Inputs:
    """What a build's captions come from; of equal captions the first is kept, in the order of the attributes.

    Attributes:
        base: The version that is added to; None where nothing is added to.
        indexes: Indexes whose captions are taken over.
        scans: Dump files.
        lenders: Indexes that only lend embeddings.
    """

    base: StoredIndex | None
    indexes: tuple[StoredIndex, ...]
    scans: tuple[DumpScan, ...]
    lenders: tuple[StoredIndex, ...]

    @property
    def parents(self) -> tuple[StoredIndex, ...]:
        """The indexes whose captions the new version has."""
        return (*([self.base] if self.base else ()), *self.indexes)

    def sources(self, rows: Sequence[int] | None = None) -> tuple[SourceEntry, ...]:
        """Returns the source files: those of the parents, then the dumps; each once, under a unique name.

        Args:
            rows: The number of rows in each dump file, once they are counted.
        """
        entries: dict[tuple[str, str], SourceEntry] = {}
        for entry in self._entries(rows or [0] * len(self.scans)):
            entries.setdefault((entry.uri, entry.sha256), entry)
        return _with_unique_names(entries.values())

    def _entries(self, rows: Sequence[int]) -> Iterator[SourceEntry]:
        for parent in self.parents:
            yield from parent.manifest.sources
        for scan, count in zip(self.scans, rows, strict=True):
            yield SourceEntry(uri=scan.dump.uri, name=scan.dump.name, rows=count, sha256=scan.sha256)

    def deal_tasks(
        self, work_uri: str, columns: CaptionColumns, cleaning: CleaningConfig, identity: EncoderIdentity
    ) -> tuple[list[DealTask | DealStoredTask], int]:
        """Returns the dealing tasks in the order of their rows, and the number of buckets."""
        buckets = plan_buckets(self._bytes())
        position = {(source.uri, source.sha256): number for number, source in enumerate(self.sources())}
        tasks: list[DealTask | DealStoredTask] = []

        def add_stored(index: StoredIndex, role: Role) -> None:
            stored = index.manifest.sources if role != "lender" else ()
            sources = {source.name: position[source.uri, source.sha256] for source in stored}
            same_encoder = index.manifest.encoder.weights_sha256 == identity.weights_sha256
            for shard in range(len(index.manifest.captions)):
                with_vectors = same_encoder and role != "known"
                tasks.append(DealStoredTask(work_uri, len(tasks), index, shard, role, sources, buckets, with_vectors))

        if self.base is not None:
            add_stored(self.base, "known")
        for index in self.indexes:
            add_stored(index, "input")
        dump_positions = [position[scan.dump.uri, scan.sha256] for scan in self.scans]
        tasks += plan_dealing(self.scans, work_uri, columns, cleaning, buckets, len(tasks), dump_positions)
        for index in self.lenders:
            if index.manifest.encoder.weights_sha256 == identity.weights_sha256:
                add_stored(index, "lender")
        return tasks, buckets

    def _bytes(self) -> int:
        """Estimates how much is dealt: the dumps, and the texts and embeddings of the indexes."""
        stored = [entry.bytes for index in self.parents for entry in index.manifest.captions]
        manifests = [index.manifest for index in (*self.indexes, *self.lenders)]
        moved = [entry.bytes for manifest in manifests for entry in (manifest.vectors or manifest.shards)]
        return sum(scan.bytes for scan in self.scans) + sum(stored) + sum(moved)

    def fingerprint(self, identity: EncoderIdentity, options: Mapping[str, Any]) -> str:
        """Returns the fingerprint of the inputs and of all options that decide what is built from them."""
        decides = {
            "builder": version("smallcap"),
            "encoder": [identity.weights_sha256, identity.dim],
            "base": self.base.manifest.index_id if self.base else None,
            "given": [index.manifest.index_id for index in self.indexes],
            "scans": [[scan.dump.uri, scan.sha256] for scan in self.scans],
            "lenders": [index.manifest.index_id for index in self.lenders],
            "options": options,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def open_inputs(config: IndexConfig, index_uri: str, current: IndexManifest | None) -> Inputs:
    """Opens the indexes that a build reads; its dumps are scanned later.

    Args:
        config: The build's options.
        index_uri: Where the build publishes.
        current: The version that is current there.

    Raises:
        ConfigError: The options contradict the index that is added to.
        ManifestError: An index does not exist.
        IndexIntegrityError: The files of an index do not fit together.
    """

    def stored(uri: str, manifest: IndexManifest | None = None) -> StoredIndex:
        return StoredIndex(storage.absolute(uri), manifest or load_manifest(uri), config.cache_dir)

    if (config.add or config.remove or config.compact) and current is None:
        raise ManifestError(
            "There is no published index to add to, remove from or compact.",
            where=index_uri,
            remedy="Build one first: the same command without --add, --remove and --compact.",
        )
    base = stored(index_uri, current) if config.add or config.remove else None
    if base is not None and config.index_key not in ("auto", base.manifest.index_key):
        raise ConfigError(
            "Captions that are added to an index must use the key of that index.",
            where="index_key",
            expected=f"{base.manifest.index_key}, or auto",
            found=config.index_key,
            remedy=f"To change the key, rebuild it: smallcap build-index --compact --index-key {config.index_key} …",
        )
    indexes = (stored(index_uri, current),) if config.compact else tuple(map(stored, config.from_indexes))
    inputs = Inputs(base, indexes, (), tuple(map(stored, config.reuse)))
    for parent in inputs.parents:
        parent.check_pairs()
    return inputs


def resolve_encoder(config: IndexConfig, inputs: Inputs) -> EncoderIdentity:
    """Returns the identity of the new version's encoder; where nothing is embedded, its weights are not needed.

    Raises:
        CheckpointError: The encoder cannot be found.
        IndexIntegrityError: The index that is added to was made by another encoder.
    """
    parents, base = inputs.parents, inputs.base
    if config.encoder is None and not config.dumps:
        return parents[0].manifest.encoder
    encoder = resolve_encoder_identity(config.encoder or parents[0].manifest.encoder.spec, config.cache_dir)
    if base is not None:
        base.manifest.check_encoder(encoder, base.uri)
    return encoder


def _with_unique_names(entries: Iterable[SourceEntry]) -> tuple[SourceEntry, ...]:
    """Numbers equal names of different files, as `captions.csv#2`; the parents' names come first and stay."""
    taken: set[str] = set()
    named = []
    for entry in entries:
        name, number = entry.name, 2
        while name in taken:
            name, number = f"{entry.name}#{number}", number + 1
        taken.add(name)
        named.append(entry.model_copy(update={"name": name}))
    return tuple(named)
