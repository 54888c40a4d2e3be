"""Uses a build's retrieval encoder: to embed captions, to try it on a few first, and to embed calibration images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from index_builder.dumps.buckets import UniqueCaptions
from index_builder.embedding.image_queries import LEAST_IMAGES, EmbedImages
from index_builder.embedding.slices import CachedEncoder, EmbedSlices, Probe, ProbeEncoder, VectorSlices
from index_builder.work.stage_runner import Sizes, StageRunner
from smallcap.errors import ConfigError
from smallcap.index.manifest import EncoderIdentity

_SAME_ENCODER = 0.98  # cosine of two embeddings of one text, which may differ by precision and white space


class Encoding:
    """A build's encoder.

    Args:
        encoder: The encoder's identity.
        dtype: Precision of its weights.
        runner: What runs the actors that load it.
        cache_dir: Each node's cache folder, for a copy of an encoder that is remote.
    """

    def __init__(self, encoder: EncoderIdentity, dtype: str, runner: StageRunner, cache_dir: str) -> None:
        self.encoder, self.dtype, self._runner = encoder, dtype, runner
        self._cached = CachedEncoder(encoder, cache_dir)

    def embed(self, captions: UniqueCaptions, to_embed: int, work_uri: str) -> VectorSlices:
        """Embeds the captions that have no embedding, and gathers the other embeddings; keeps slices already written.

        Args:
            captions: The captions.
            to_embed: How many of them have no embedding.
            work_uri: The build's work folder.
        """
        vectors = VectorSlices(work_uri, len(captions), self.encoder.dim)
        missing = vectors.missing()
        if missing:
            encoder = self._cached if to_embed else None
            self._runner.run_actors(
                "embed",
                EmbedSlices,
                lambda device: (encoder, device, self.dtype, captions, vectors),
                missing,
                Sizes([vectors.rows_of(number) for number in missing]),
            )
        return vectors

    def estimate_seconds(self, captions: UniqueCaptions, to_embed: int) -> float:
        """Estimates how long embedding takes on this cluster, from a few captions in one actor."""
        if not to_embed:
            return 0.0
        return self._probe(captions).seconds_per_caption * to_embed / self._runner.plan_actors().num_actors

    def check_imported(self, captions: UniqueCaptions, dumps: Sequence[str]) -> None:
        """Embeds a few captions with imported embeddings, to check that these were made by this encoder.

        Raises:
            ConfigError: They were not.
        """
        cosines = self._probe(captions).cosines
        typical = float(np.median(cosines)) if cosines else 1.0
        if typical < _SAME_ENCODER:
            raise ConfigError(
                "The dump's embeddings are not this encoder's embeddings of its texts.",
                where=", ".join(dumps),
                expected=f"cosine 1 with the embeddings that {self.encoder.spec} makes",
                found=f"{typical:.3f}, the median of {len(cosines)}",
                remedy="Name the --encoder that made them; --set trust_embeddings=true accepts them as they are.",
            )

    def _probe(self, captions: UniqueCaptions) -> Probe:
        [probe] = self._runner.run_actors(
            "probe", ProbeEncoder, lambda device: (self._cached, device, self.dtype, captions), [0]
        )
        return probe

    def image_queries(self, images: Sequence[str], tasks: Sequence[Sequence[str]]) -> np.ndarray:
        """Embeds images as calibration queries, [Q, dim] float32.

        Args:
            images: The image files, folders, prefixes and lists that the user named, for errors.
            tasks: The images' URIs, as `plan_image_queries` returns them.

        Raises:
            ConfigError: Too few images can be read.
        """
        embedded = self._runner.run_actors(
            "embed images",
            EmbedImages,
            lambda device: (self._cached, device, self.dtype),
            tasks,
        )
        queries = np.concatenate([batch.vectors for batch in embedded])
        if len(queries) < LEAST_IMAGES:
            raise ConfigError(
                "Too few calibration images can be read.",
                where=", ".join(images),
                expected=f"at least {LEAST_IMAGES}",
                found=f"{len(queries)} of {len(queries) + sum(batch.failed for batch in embedded)}",
            )
        return queries
