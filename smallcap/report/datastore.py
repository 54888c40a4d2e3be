"""Reads what a report shows of a datastore: how long its texts are, where they come from, which are nearly the same.

Only the manifest and the caption files are read; vectors are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smallcap import storage
from smallcap.evaluation.caption_words import content_words
from smallcap.evaluation.ptb_tokenizer import tokenize_in_python
from smallcap.index.caption_store import open_arrow, open_removed
from smallcap.index.manifest import IndexManifest, load_manifest
from smallcap.report.measures import CHARACTERS, WORDS, Distribution
from smallcap.report.sampling import Row, Smallest, name_keys

_BATCH_ROWS = 10_000
_MOST_COMPARED = 2_000_000  # captions whose content words are compared; ids are in the order of a hash of the text
_GROUPS, _OF_GROUP = 12, 5  # of nearly equal captions that are shown
_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads ids over all numbers (Knuth's multiplicative hashing)


@dataclass(frozen=True)
class NearDuplicates:
    """Captions that have the same content words as another one.

    Attributes:
        compared: The number of captions that were compared.
        captions: How many of them have the same content words as another one.
        groups: The number of different such sets of words.
        largest: For the largest groups, the number of captions and some of them.
    """

    compared: int
    captions: int
    groups: int
    largest: list[tuple[int, list[str]]]


@dataclass(frozen=True)
class Datastore:
    """What a report shows of an index.

    Attributes:
        manifest: The manifest of the version.
        lengths: How many words and characters the live captions have.
        by_source: The number of live captions that each source has, by its name.
        shared: How many live captions several sources have.
        with_images: How many live captions name the image that they are of.
        near_duplicates: Captions that are nearly the same.
        rows: Captions drawn at random: `id`, `text`, `sources` and `images`, their number of images.
    """

    manifest: IndexManifest
    lengths: tuple[Distribution, Distribution]
    by_source: dict[str, int]
    shared: int
    with_images: int
    near_duplicates: NearDuplicates
    rows: list[Row]


def read_datastore(index_uri: str, count: int) -> Datastore:
    """Reads the current version of an index.

    Args:
        index_uri: The index.
        count: The most captions to draw.

    Raises:
        ManifestError: There is no such index.
        StorageError: A caption file cannot be read.
    """
    manifest = load_manifest(index_uri)
    words, characters = Distribution(WORDS), Distribution(CHARACTERS)
    by_source: Counter[str] = Counter()
    shared = with_images = 0
    drawn = Smallest(count)
    for batch in _live_captions(index_uri, manifest):
        spaces = pc.count_substring(batch["text"], " ")
        words.add(pc.add(spaces, 1).to_numpy(zero_copy_only=False))
        characters.add(pc.utf8_length(batch["text"]).to_numpy(zero_copy_only=False))
        for found in pc.value_counts(pc.list_flatten(batch["source"])).to_pylist():
            by_source[found["values"]] += found["counts"]
        shared += int(np.count_nonzero(pc.list_value_length(batch["source"]).to_numpy(zero_copy_only=False) > 1))
        with_images += len(batch) - batch["image_id"].null_count
        keys = batch["caption_id"].to_numpy(zero_copy_only=False).astype(np.uint64) * _ODD
        drawn.offer(batch, keys, np.ones(len(batch), bool))
    rows = [
        {
            "id": row["caption_id"],
            "text": row["text"],
            "sources": row["source"],
            "images": len(row["image_id"] or ()),
        }
        for row in sorted(drawn.rows(), key=lambda row: row["caption_id"])
    ]
    near = _near_duplicates(index_uri, manifest)
    return Datastore(manifest, (words, characters), dict(by_source.most_common()), shared, with_images, near, rows)


def _live_captions(index_uri: str, manifest: IndexManifest) -> Iterator[pa.RecordBatch]:
    """Yields the captions that are retrieved, in the order of their ids, ten thousand at a time."""
    removed = open_removed(manifest, index_uri)
    for shard in manifest.captions:
        with open_arrow(storage.join(index_uri, shard.file)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
            live = np.setdiff1d(np.arange(batch.num_rows), removed - shard.first_id)
            for start in range(0, len(live), _BATCH_ROWS):
                yield batch.take(pa.array(live[start : start + _BATCH_ROWS]))


def _near_duplicates(index_uri: str, manifest: IndexManifest) -> NearDuplicates:
    found: list[np.ndarray] = [np.empty(0, np.uint64)]
    compared = 0
    for texts in _compared_texts(index_uri, manifest):
        found.append(name_keys(map(same_words_key, texts)))
        compared += len(texts)
    keys = np.concatenate(found)
    without_words = name_keys([""])[0]
    unique, counts = np.unique(keys[keys != without_words], return_counts=True)
    several = counts > 1
    order = np.argsort(-counts, kind="stable")[:_GROUPS]
    sizes = {int(unique[place]): int(counts[place]) for place in order if counts[place] > 1}
    examples: dict[int, list[str]] = {key: [] for key in sizes}
    if examples:
        for texts, batch_keys in zip(_compared_texts(index_uri, manifest), found[1:], strict=True):
            for place in np.flatnonzero(np.isin(batch_keys, np.array(list(sizes), np.uint64))).tolist():
                group = examples[int(batch_keys[place])]
                if len(group) < _OF_GROUP:
                    group.append(texts[place])
    largest = [(size, examples[key]) for key, size in sizes.items()]
    return NearDuplicates(compared, int(counts[several].sum()), int(several.sum()), largest)


def _compared_texts(index_uri: str, manifest: IndexManifest) -> Iterator[list[str]]:
    left = _MOST_COMPARED
    for batch in _live_captions(index_uri, manifest):
        yield batch["text"].slice(0, left).to_pylist()
        left -= len(batch)
        if left <= 0:
            return


def same_words_key(text: str) -> str:
    """Returns the different content words of a caption in alphabetical order; empty where it has none."""
    return " ".join(sorted(content_words([tokenize_in_python(text)])))
