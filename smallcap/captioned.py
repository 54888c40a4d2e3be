"""Batches of images on their way, and what becomes of them: columns for jobs, an object per image for Python code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from torch import Tensor

from smallcap.errors import RowError
from smallcap.images.crops import Pixels
from smallcap.index.retriever import Neighbour, Neighbours
from smallcap.redaction import hide_secrets


@dataclass(frozen=True)
class ScoredCaption:
    """A caption of an image and its score."""

    caption: str
    logprob: float  # natural log, summed over the caption's tokens
    num_tokens: int  # generated tokens, eos included


@dataclass(frozen=True)
class CaptionResult:
    """What became of one image: a caption, or an error."""

    caption: str | None = None
    logprob: float | None = None  # natural log, summed over the caption's tokens
    num_tokens: int | None = None  # generated tokens, eos included
    clip_score: float | None = None  # cosine of image and caption; None without a retrieval encoder
    alternatives: tuple[ScoredCaption, ...] = ()  # the next best captions, if more than one is wanted
    neighbours: tuple[Neighbour, ...] = ()
    embedding: np.ndarray | None = field(default=None, compare=False)  # [dim] float32, the retrieval encoder's
    width: int | None = None  # px
    height: int | None = None  # px
    error: RowError | None = None

    def __repr__(self) -> str:
        if self.error is not None:
            where = f", where={hide_secrets(self.error.where)!r}" if self.error.where else ""
            return f"CaptionResult(error={self.error.code.value!r}, {self.error.what!r}{where})"
        score = "" if self.clip_score is None else f", clip_score={self.clip_score:.3f}"
        return f"CaptionResult({self.caption!r}{score}, neighbours={len(self.neighbours)})"

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the captions, and what was retrieved for them; all text is escaped."""
        if self.error is not None:
            lines = escape(str(self.error)).replace("\n", "<br>")
            return f"<p><b>{escape(self.error.code.value)}</b>: {lines}</p>"
        score = "" if self.clip_score is None else f" (clip score {self.clip_score:.2f})"
        others = "".join(f"<br>{escape(other.caption)}" for other in self.alternatives)
        rows = "".join(f"<tr><td>{one.score:.2f}</td><td>{escape(one.text)}</td></tr>" for one in self.neighbours)
        retrieved = f"<table><tr><th>score</th><th>retrieved</th></tr>{rows}</table>" if rows else ""
        return f"<p><b>{escape(self.caption or '')}</b>{score}{others}</p>{retrieved}"


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of B images for which captions can be generated."""

    pixels: Sequence[Pixels]
    hidden_states: Tensor  # [B, P, Hv]
    embeddings: np.ndarray  # [B, dim] float32; dim is 0 without a retrieval encoder
    neighbours: Neighbours
    prompts: list[list[int]]  # token ids


@dataclass(frozen=True)
class ScoredCaptions:
    """C captions of each of B images, as columns, the best first."""

    texts: list[str]  # B * C, one image after the other
    logprobs: np.ndarray  # [B, C] float64, natural log, summed over the caption's tokens
    num_tokens: np.ndarray  # [B, C] int64, generated tokens, eos included

    @property
    def best(self) -> list[str]:
        """The best caption of each image."""
        return self.texts[:: self.logprobs.shape[1]]

    def order_by(self, order: np.ndarray) -> ScoredCaptions:
        """Returns some of each image's captions in another order; `order`, [B, D] int64, are their places before."""
        images, count = self.logprobs.shape
        places = np.arange(images)[:, None] * count + order
        return ScoredCaptions(
            [self.texts[place] for place in places.ravel().tolist()],
            np.take_along_axis(self.logprobs, order, axis=1),
            np.take_along_axis(self.num_tokens, order, axis=1),
        )

    def fill_empty(self, search: Callable[[np.ndarray], ScoredCaptions]) -> ScoredCaptions:
        """Returns captions in which no empty one comes before one with text.

        Args:
            search: Returns all captions that were found for some images, [D] int64; it is called for those whose best
                one is empty, if there are any.
        """
        images = np.array([image for image, text in enumerate(self.best) if not text], np.int64)
        if not len(images):
            return self
        found, count = search(images), self.logprobs.shape[1]
        is_empty = np.array([not text for text in found.texts]).reshape(found.logprobs.shape)
        chosen = found.order_by(np.argsort(is_empty, axis=1, kind="stable")[:, :count])
        texts, logprobs, num_tokens = self.texts.copy(), self.logprobs.copy(), self.num_tokens.copy()
        logprobs[images], num_tokens[images] = chosen.logprobs, chosen.num_tokens
        for number, image in enumerate(images.tolist()):
            texts[image * count : (image + 1) * count] = chosen.texts[number * count : (number + 1) * count]
        return ScoredCaptions(texts, logprobs, num_tokens)

    def rank(self, scores: np.ndarray, count: int) -> tuple[ScoredCaptions, np.ndarray]:
        """Returns the best `count` captions of each image by scores, [B * C] float32, and the best one's score, [B].

        Empty captions come last.
        """
        by_image = scores.reshape(self.logprobs.shape)
        is_empty = np.array([not text for text in self.texts], bool).reshape(by_image.shape)
        order = np.argsort(np.where(is_empty, np.inf, -by_image), axis=1, kind="stable")[:, :count]
        return self.order_by(order), np.take_along_axis(by_image, order[:, :1], axis=1)[:, 0]


@dataclass(frozen=True)
class CaptionedBatch:
    """What became of B decoded images, as columns: a job has no Python object for each neighbour or result."""

    captions: ScoredCaptions
    clip_scores: np.ndarray | None  # [B] float32, cosines of image and best caption; None if they are not wanted
    neighbours: Neighbours
    embeddings: np.ndarray | None  # [B, dim] float32; None without a retrieval encoder
    sizes: np.ndarray  # [B, 2] int32, px, width and height of the whole images

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def nothing(cls) -> CaptionedBatch:
        """Returns what becomes of no images."""
        captions = ScoredCaptions([], np.empty((0, 1)), np.empty((0, 1), np.int64))
        return cls(captions, None, Neighbours.none(0), None, np.empty((0, 2), np.int32))

    @classmethod
    def join(cls, parts: Sequence[CaptionedBatch]) -> CaptionedBatch:
        """Puts batches of one captioner together; parts without images are left out."""
        filled = [part for part in parts if len(part)]
        if len(filled) < 2:
            return filled[0] if filled else cls.nothing()
        captions = [part.captions for part in filled]
        return cls(
            ScoredCaptions(
                [text for part in captions for text in part.texts],
                np.concatenate([part.logprobs for part in captions]),
                np.concatenate([part.num_tokens for part in captions]),
            ),
            _join_columns([part.clip_scores for part in filled]),
            Neighbours.join([part.neighbours for part in filled]),
            _join_columns([part.embeddings for part in filled]),
            np.concatenate([part.sizes for part in filled]),
        )

    def to_results(self) -> list[CaptionResult]:
        """Returns each image's result as an object."""
        captions, count = self.captions, self.captions.logprobs.shape[1]
        flat = list(
            map(ScoredCaption, captions.texts, captions.logprobs.ravel().tolist(), captions.num_tokens.ravel().tolist())
        )
        neighbours, sizes = self.neighbours.to_rows(), self.sizes.tolist()
        return [
            CaptionResult(
                caption=flat[image * count].caption,
                logprob=flat[image * count].logprob,
                num_tokens=flat[image * count].num_tokens,
                clip_score=None if self.clip_scores is None else float(self.clip_scores[image]),
                alternatives=tuple(flat[image * count + 1 : (image + 1) * count]),
                neighbours=tuple(neighbours[image]),
                embedding=None if self.embeddings is None else self.embeddings[image],
                width=sizes[image][0],
                height=sizes[image][1],
            )
            for image in range(len(self))
        ]


def _join_columns(columns: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [column for column in columns if column is not None]
    return np.concatenate(known) if known else None
