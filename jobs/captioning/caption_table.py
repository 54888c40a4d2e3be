"""Captions Arrow tables: crops go in as they were loaded, captions and neighbours come out as columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioning.load import CONTENT_KEY, INDEX_NAME, RETRIEVAL_PIXELS, VISION_PIXELS
from smallcap.captioned import CaptionedBatch, ScoredCaptions
from smallcap.captioner import Batch, Captioner
from smallcap.images.crops import Pixels
from smallcap.output.schema import (
    ALTERNATIVE_TYPE,
    CAPTION_COLUMNS,
    EMBEDDING_COLUMN,
    SHARED_WORDS_COLUMNS,
    STATUS_OK,
)

_FROM_LOADING = ("image_id", "image_uri", "status", "error_code", "error_message")
_FROM_CAPTIONING = [field for field in CAPTION_COLUMNS if field.name not in (*_FROM_LOADING, *SHARED_WORDS_COLUMNS)]
_LEFT_OUT = (VISION_PIXELS, RETRIEVAL_PIXELS, CONTENT_KEY, INDEX_NAME, "width", "height")


class TableCaptioner:
    """Captions tables of loaded images; several threads may call it.

    Args:
        captioner: Captions the images.
        batch_size: The most images that go through the model together.
        exclude_own: Whether an image's own captions are not retrieved for it.
        embeds: Whether the images' embeddings are kept.
        score_column: A column of texts that are compared with the images as captions are.
        note_batch: Called when one of the model's batches is captioned.
    """

    def __init__(
        self,
        captioner: Captioner,
        batch_size: int,
        *,
        exclude_own: bool,
        embeds: bool,
        score_column: str | None = None,
        note_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._captioner, self._batch_size, self._note_batch = captioner, batch_size, note_batch
        self._score_column = score_column
        self._exclude_own, self._embeds = exclude_own, embeds

    def __call__(self, batch: pa.Table) -> tuple[pa.Table, CaptionedBatch]:
        """Captions a table of `load_images`.

        Returns:
            Rows of the newest schema with the further columns that the writer needs, and what became of those images
            that could be loaded.
        """
        good = np.flatnonzero(pc.equal(batch["status"], STATUS_OK).to_numpy())
        done = []
        for columns in self._captioner.caption_columns(self.batches(batch, good)):
            done.append(columns)
            self._note_batch()
        captioned = CaptionedBatch.join(done)
        return self.tabulate(batch, good, captioned), captioned

    def batches(self, batch: pa.Table, good: np.ndarray) -> Iterator[Batch]:
        """Yields the images of the given rows in the model's batches.

        With them come the ids whose captions they must not get, and the names of the indexes to search.
        """
        pixels = pixels_of(batch, good)
        exclude = batch["image_id"].take(pa.array(good)).to_pylist() if self._exclude_own else None
        names = batch[INDEX_NAME].take(pa.array(good)).to_pylist() if INDEX_NAME in batch.column_names else None
        for start in range(0, len(pixels), self._batch_size):
            rows = slice(start, start + self._batch_size)
            yield pixels[rows], exclude and exclude[rows], names and names[rows]

    def tabulate(self, batch: pa.Table, good: np.ndarray, captioned: CaptionedBatch) -> pa.Table:
        """Returns the rows of a call; `captioned` are the images of the rows `good`, in their order."""
        places = np.full(len(batch), -1)
        places[good] = np.arange(len(good))
        rows = pa.array(places, mask=places < 0)  # null for a failed image, which has nulls in the new columns
        columns = _columns(captioned) | self._scores(batch, good, captioned)
        fields = [*_FROM_CAPTIONING, *(field for field in batch.schema if field.name not in _LEFT_OUT)]
        if self._embeds:
            fields.append(pa.field(EMBEDDING_COLUMN, pa.list_(pa.float32())))
            columns[EMBEDDING_COLUMN] = _embedding_column(captioned)
        arrays = [columns[field.name].take(rows) if field.name in columns else batch[field.name] for field in fields]
        return pa.table(arrays, schema=pa.schema(fields))

    def _scores(self, batch: pa.Table, good: np.ndarray, captioned: CaptionedBatch) -> dict[str, pa.Array]:
        """Returns the columns that compare captions and given texts with images."""
        captions, clip = pa.array(captioned.captions.best, pa.string()), _clip_scores(captioned)
        has_text = pc.not_equal(captions, "")
        best = pc.if_else(has_text, captions, None)
        if self._score_column is None or not len(captioned):
            return {"clip_score": clip, "alt_clip_score": pa.nulls(len(captioned), pa.float32()), "best_caption": best}
        texts = batch[self._score_column].take(pa.array(good)).combine_chunks().cast(pa.string())
        texts = pc.if_else(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), texts, None)
        alt = self._alt_clip_scores(captioned, texts)
        is_better = pc.or_kleene(pc.greater(alt, clip), pc.and_(texts.is_valid(), pc.invert(has_text)))
        return {
            "clip_score": clip,
            "alt_clip_score": alt,
            "best_caption": pc.if_else(pc.fill_null(is_better, False), texts, best),
        }

    def _alt_clip_scores(self, captioned: CaptionedBatch, texts: pa.StringArray) -> pa.Array:
        """Returns the cosine of each image and its text; null without a text."""
        scores = np.full(len(texts), np.nan, np.float32)
        rows = np.flatnonzero(texts.is_valid().to_numpy(zero_copy_only=False))
        assert captioned.embeddings is not None, "the job refuses a score column without a retrieval encoder"
        for start in range(0, len(rows), self._batch_size):
            some = rows[start : start + self._batch_size]
            found = self._captioner.clip_scores(captioned.embeddings[some], texts.take(pa.array(some)).to_pylist())
            assert found is not None, "nor without clip scores"
            scores[some] = found
        return pa.array(scores, from_pandas=True)


def pixels_of(batch: pa.Table, rows: Sequence[int] | np.ndarray) -> list[Pixels]:
    """Returns the crops of the given rows of a batch of `load_images`, as views into the batch: nothing is copied."""
    vision = _views(batch[VISION_PIXELS])
    retrieval = _views(batch[RETRIEVAL_PIXELS]) if RETRIEVAL_PIXELS in batch.column_names else [None] * len(batch)
    keys = batch[CONTENT_KEY].to_pylist() if CONTENT_KEY in batch.column_names else [None] * len(batch)
    widths, heights = batch["width"].to_pylist(), batch["height"].to_pylist()
    return [Pixels(vision[row], retrieval[row], widths[row], heights[row], key=keys[row]) for row in rows]


def _views(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Returns each row of a tensor column, whichever chunk it lies in."""
    return [view for chunk in column.chunks for view in chunk.to_numpy_ndarray()]


def _columns(captioned: CaptionedBatch) -> dict[str, pa.Array]:
    """Returns the columns that captioning adds, one row for each image."""
    captions, sizes = captioned.captions, captioned.sizes
    return {
        "width": pa.array(sizes[:, 0]),
        "height": pa.array(sizes[:, 1]),
        "caption": pa.array(captions.best, pa.string()),
        "caption_logprob": pa.array(captions.logprobs[:, 0].astype(np.float32)),
        "caption_tokens": pa.array(captions.num_tokens[:, 0].astype(np.int16)),
        "alternatives": _alternatives_column(captions),
        "neighbours": captioned.neighbours.to_column(),
        "retrieval_score": captioned.neighbours.mean_scores(),
    }


def _clip_scores(captioned: CaptionedBatch) -> pa.Array:
    scores = captioned.clip_scores
    return pa.nulls(len(captioned), pa.float32()) if scores is None else pa.array(scores, pa.float32())


def _alternatives_column(captions: ScoredCaptions) -> pa.ListArray:
    images, count = captions.logprobs.shape
    texts = [text for place, text in enumerate(captions.texts) if place % count] if count > 1 else []
    logprobs, tokens = captions.logprobs[:, 1:].ravel(), captions.num_tokens[:, 1:].ravel()
    arrays = [pa.array(texts, pa.string()), pa.array(logprobs.astype(np.float32)), pa.array(tokens.astype(np.int16))]
    values = pa.StructArray.from_arrays(arrays, fields=list(ALTERNATIVE_TYPE))
    return pa.ListArray.from_arrays(np.arange(images + 1, dtype=np.int32) * np.int32(count - 1), values)


def _embedding_column(captioned: CaptionedBatch) -> pa.ListArray:
    vectors = captioned.embeddings
    if vectors is None:
        return pa.nulls(len(captioned), pa.list_(pa.float32()))
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * np.int32(vectors.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))
