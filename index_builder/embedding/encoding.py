"""What a build does with its retrieval encoder: embed captions, try it on a few first, embed calibration images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from index_builder.dumps.buckets import UniqueCaptions
from index_builder.embedding.parts import EmbedParts, Probe, ProbeEncoder, VectorParts
from index_builder.work.stage_runner import StageRunner
from smallcap.errors import ConfigError
from smallcap.index.manifest import EncoderIdentity

_SAME_ENCODER = 0.98  # cosine of embeddings of one text that only precision and white space may tell apart


class Encoding:
    """A build's encoder.

    Args:
        encoder: Which one.
        dtype: Precision of its weights.
        runner: Runs the actors that load it.
    """

    def __init__(self, encoder: EncoderIdentity, dtype: str, runner: StageRunner) -> None:
        self.encoder, self.dtype, self._runner = encoder, dtype, runner

    def embed(self, captions: UniqueCaptions, to_embed: int, work_uri: str) -> VectorParts:
        """Embeds the captions that have no embedding, and gathers the others'; parts that are there are left alone.

        Args:
            captions: The captions.
            to_embed: How many of them have no embedding.
            work_uri: The build's work folder.
        """
        vectors = VectorParts(work_uri, len(captions), self.encoder.dim)
        parts = vectors.missing()
        if parts:
            encoder = self.encoder if to_embed else None
            self._runner.run_actors(
                "embed",
                EmbedParts,
                lambda device: (encoder, device, self.dtype, captions, vectors),
                parts,
                [vectors.rows_of(part) for part in parts],
            )
        return vectors

    def estimate_seconds(self, captions: UniqueCaptions, to_embed: int) -> float:
        """Returns how long the embedding will take on this cluster, from a few captions in one actor."""
        if not to_embed:
            return 0.0
        return self._probe(captions).seconds_per_caption * to_embed / self._runner.plan_actors().num_actors

    def check_imported(self, captions: UniqueCaptions, dumps: Sequence[str]) -> None:
        """Embeds some captions that brought an embedding, to see that it is this encoder's.

        Raises:
            ConfigError: It is not.
        """
        cosines = self._probe(captions).cosines
        typical = float(np.median(cosines)) if cosines else 1.0
        if typical < _SAME_ENCODER:
            raise ConfigError(
                "The dump's embeddings are not this encoder's embeddings of its texts.",
                where=", ".join(dumps),
                expected=f"cosine 1 with what {self.encoder.spec} makes of the texts",
                found=f"{typical:.3f}, the median of {len(cosines)}",
                remedy="Name the --encoder that made them; --set trust_embeddings=true takes them as they are.",
            )

    def _probe(self, captions: UniqueCaptions) -> Probe:
        [probe] = self._runner.run_actors(
            "probe", ProbeEncoder, lambda device: (self.encoder, device, self.dtype, captions), [0]
        )
        return probe

    def image_queries(self, images: Sequence[str], count: int) -> np.ndarray:
        """Embeds up to `count` of some images as calibration queries, [Q, dim] float32.

        Args:
            images: Files, folders, prefixes and lists of them.
            count: How many at the most.

        Raises:
            ConfigError: There are too few that can be read.
        """
        from index_builder.embedding.image_queries import LEAST_IMAGES, EmbedImages, plan_image_queries  # torch

        embedded = self._runner.run_actors(
            "embed images",
            EmbedImages,
            lambda device: (self.encoder.spec, device, self.dtype),
            plan_image_queries(images, count),
        )
        queries = np.concatenate([part.vectors for part in embedded])
        if len(queries) < LEAST_IMAGES:
            raise ConfigError(
                "Too few of the calibration images can be read.",
                where=", ".join(images),
                expected=f"at least {LEAST_IMAGES}",
                found=f"{len(queries)} of {len(queries) + sum(part.failed for part in embedded)}",
            )
        return queries
