"""Makes caption embeddings that resemble CLIP's, queries at the distance of images, and their exact neighbours.

**The vectors are made, not embedded.** No weights are downloaded here, and isotropic noise would not do: its nearest
neighbours are all about equally far away, so lists, codes and recall would mean nothing. These properties are imitated:

- *a common direction*: CLIP's text embeddings lie in a narrow cone; two random ones here have a cosine of about 0.5;
- *a falling spectrum*: otherwise they vary most in few directions: eigenvalue i is proportional to (i + 8)^-1.2, in a
  random basis, so half of the 512 directions have nine tenths of the variance;
- *topics*: there are a thousand, some much more common than others (Zipf); the cosine within one is about 0.8;
- *near-paraphrases*: captions come in scenes of one to nine, like an image's; the cosine within one is about 0.9.

The shares were chosen so that lists work about as well as on sentence embeddings of real captions: searching 1.6% of
the lists found 92% of the four nearest captions of image-like queries (95.6% there), and 99.8% for caption-like queries
(99.5% there).

Rows are shuffled, so the first rows are a fair sample for training. A smaller set is not a subset of a larger one, but
another datastore over the same topics. Repeated captions and different languages or sources are not imitated. Recall
here distinguishes kinds of indexes; to know the recall of your datastore, build its index.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from index_builder.recall.measurement import imitate_images

DIM = 512
RECALL_AT = (4, 10)
_SEED = 7
_TOPICS = 1_000
_SHARES = (0.5, 0.32, 0.11, 0.07)  # of a vector's squared length: common direction, topic, scene, single caption
_LARGEST_SCENE = 9
_ROWS_AT_ONCE = 16_384
_QUERIES_OF_BUILDER = 4096  # more than it calibrates and reports with; see `make_queries`
_WORDS = (
    "a the two man woman young old dog cat child red green blue white large street beach park kitchen table chair bus "
    "train horse field snow water boat standing sitting walking riding holding looking playing eating next behind under"
)


@dataclass(frozen=True)
class World:
    """What all made embeddings share."""

    mean: np.ndarray  # [DIM] unit vector
    mixing: np.ndarray  # [DIM, DIM]: white noise becomes vectors with the spectrum, of length 1 on average
    topics: np.ndarray  # [_TOPICS, DIM], of length 1 on average
    popularity: np.ndarray  # [_TOPICS], sums to 1

    @classmethod
    def make(cls) -> World:
        """Makes the world of this benchmark, which is always the same."""
        rng = np.random.default_rng(_SEED)
        basis, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
        spectrum = (np.arange(DIM) + 8.0) ** -1.2
        mixing = (np.sqrt(spectrum / spectrum.sum())[:, None] * basis.T).astype(np.float32)
        mean = rng.standard_normal(DIM).astype(np.float32)
        topics = rng.standard_normal((_TOPICS, DIM), np.float32) @ mixing
        popularity = (np.arange(_TOPICS) + 20.0) ** -0.8
        return cls(mean / np.linalg.norm(mean), mixing, topics, popularity / popularity.sum())

    def draw(self, scenes: int, rng: np.random.Generator) -> np.ndarray:
        """Draws the captions of a number of scenes, scene by scene: [n, DIM] float32 unit vectors."""
        common, topic, scene, caption = np.sqrt(np.array(_SHARES, np.float32))
        centres = topic * self.topics[rng.choice(_TOPICS, scenes, p=self.popularity)]
        centres += scene * (rng.standard_normal((scenes, DIM), np.float32) @ self.mixing)
        captions = np.repeat(centres, rng.integers(1, _LARGEST_SCENE + 1, scenes), axis=0)
        captions += common * self.mean + caption * (rng.standard_normal(captions.shape, np.float32) @ self.mixing)
        captions /= np.linalg.norm(captions, axis=1, keepdims=True)
        return captions


@dataclass(frozen=True)
class MadeData:
    """A folder with the dump, the queries and their exact neighbours.

    Attributes:
        folder: `text_emb/text_emb_0.npy` (float16) and `metadata/metadata_0.parquet` as clip-retrieval writes them,
            `queries.npy` (float32), `truth.npy` (rows of the dump).
        rows: The number of captions.
    """

    folder: Path
    rows: int

    @property
    def embeddings(self) -> Path:
        """The folder that holds the file of embeddings."""
        return self.folder / "text_emb"

    @property
    def queries(self) -> Path:
        """The file of queries, [Q, DIM] float32."""
        return self.folder / "queries.npy"

    def truth(self) -> np.ndarray:
        """Returns each query's exact neighbours, best first: [Q, max(RECALL_AT)] rows of the dump."""
        truth: np.ndarray = np.load(self.folder / "truth.npy")
        return truth


def make_data(folder: Path, rows: int, queries: int) -> MadeData:
    """Makes a dump of embedded captions with queries and their truth; the same arguments give the same data."""
    data = MadeData(folder, rows)
    (folder / "metadata").mkdir(parents=True)
    data.embeddings.mkdir()
    world, rng = World.make(), np.random.default_rng([_SEED, rows])
    vectors = np.lib.format.open_memmap(
        data.embeddings / "text_emb_0.npy", mode="w+", dtype=np.float16, shape=(rows, DIM)
    )
    places, done = rng.permutation(rows), 0
    while done < rows:
        captions = world.draw(_ROWS_AT_ONCE // 5, rng)[: rows - done]
        vectors[places[done : done + len(captions)]] = captions
        done += len(captions)
    vectors.flush()
    _write_captions(folder / "metadata" / "metadata_0.parquet", rows, rng)
    made = make_queries(world, queries, rng)
    np.save(data.queries, made)
    np.save(folder / "truth.npy", exact_neighbours(vectors, made, max(RECALL_AT)))
    return data


def make_queries(world: World, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns image-like queries of scenes that have no caption in the dump: [count, DIM] float32.

    They are moved away from the texts in the way that the builder moves its queries, but in other random directions.
    """
    wanted = _QUERIES_OF_BUILDER + count
    captions = world.draw(wanted, rng)
    return imitate_images(captions[rng.permutation(len(captions))[:wanted]])[_QUERIES_OF_BUILDER:]


def exact_neighbours(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Returns the rows of the k largest inner products, best first: [Q, k]; by brute force, without faiss."""
    best_scores, best_rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        scores = queries @ vectors[start : start + _ROWS_AT_ONCE].astype(np.float32).T
        top = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
        best_scores = np.concatenate([best_scores, np.take_along_axis(scores, top, axis=1)], axis=1)
        best_rows = np.concatenate([best_rows, top + start], axis=1)
        order = np.argsort(-best_scores, axis=1, kind="stable")[:, :k]
        best_scores = np.take_along_axis(best_scores, order, axis=1)
        best_rows = np.take_along_axis(best_rows, order, axis=1)
    return best_rows


def recall(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Returns the mean share of the k exact neighbours that are among the k found; both are [Q, at least k] rows."""
    return float((found[:, :k, None] == truth[:, None, :k]).any(axis=1).mean())


def caption_row(text: str) -> int:
    """Returns the row that a caption of the dump was in."""
    return int(text.rpartition(" ")[2])


def _write_captions(path: Path, rows: int, rng: np.random.Generator) -> None:
    """Writes different captions of ordinary length: a few words and the row's number."""
    words = np.array(_WORDS.split())
    with pq.ParquetWriter(path, pa.schema([("caption", pa.string())])) as writer:
        for start in range(0, rows, _ROWS_AT_ONCE):
            chosen = words[rng.integers(0, len(words), (min(_ROWS_AT_ONCE, rows - start), 8))]
            texts = [f"{' '.join(words_of_row)} {row}" for row, words_of_row in enumerate(chosen, start=start)]
            writer.write_table(pa.table({"caption": texts}))
