"""The second stage of training: retrieves captions for every image, without the image's own, and stores them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jobs.cluster.display import Activity
from jobs.cluster.resources import node_resources
from jobs.cluster.tasks import RayRunner
from smallcap import storage
from smallcap.errors import RunError
from smallcap.index.manifest import IndexManifest
from smallcap.index.retriever import Retriever
from smallcap.machine.actor_plan import plan_actors
from smallcap.training.config import TrainConfig
from smallcap.training.feature_store import (
    CANDIDATES_FILE,
    PartEntry,
    StoreManifest,
    candidate_table,
    open_store,
    read_candidates,
    read_queries,
    write_part,
)
from smallcap.training.retrieval_sampling import candidates_needed


@dataclass(frozen=True)
class CandidateSpec:
    """What an actor needs to search."""

    index: str
    index_id: str
    cache_dir: str
    depth: int
    device: str
    features: str
    out: str


def store_candidates(
    config: TrainConfig,
    manifest: IndexManifest,
    features: StoreManifest,
    folders: tuple[str, str],
    activity: Activity,
) -> None:
    """Searches for all images that have no candidates yet; where there are any, a cluster must be connected.

    Args:
        config: The run's config.
        manifest: The pinned version of the index.
        features: The images.
        folders: The folder of features and the folder of candidates.
        activity: Counts the images.

    Raises:
        ConfigError: The folder holds candidates of other images, or of another index.
        RunError: Storage or the index fails.
    """
    depth = candidates_needed(config.retrieval.mode, config.retrieval.k)
    uri = storage.join(folders[1], CANDIDATES_FILE)
    identity = {"index_id": manifest.index_id, "depth": depth, "features": features.identity}
    store = open_store(uri, identity)
    if store.complete:
        return
    left = [part for part in features.parts if not storage.exists(storage.join(folders[1], part.split, part.name))]
    if left:
        plan = plan_actors(config.compute.to_compute_config(), node_resources())
        assert config.index is not None  # TrainConfig has checked it
        cache_dir = config.retrieval.cache_dir
        spec = CandidateSpec(config.index, manifest.index_id, cache_dir, depth, plan.device, *folders)
        activity.total = sum(part.images for part in left)
        for _, images in RayRunner(config.out).run_actors(FindCandidates, (spec,), left, plan):
            activity.done += images
    store.model_copy(update={"complete": True}).write(uri)


class FindCandidates:
    """Searches the index for the images of a part; one instance per actor."""

    def __init__(self, spec: CandidateSpec) -> None:
        self._spec = spec
        self._retriever = Retriever.open(spec.index, cache_dir=spec.cache_dir, index_id=spec.index_id)
        self._retriever.use_device(spec.device)

    def __call__(self, part: PartEntry) -> int:
        """Writes the candidates of a part; returns how many images it has."""
        spec = self._spec
        rows = read_queries(storage.join(spec.features, part.split, part.name))
        if rows.embeddings is None:
            raise RunError("The stored features have no embeddings to search with.", where=spec.features)
        candidates: list[list[dict[str, Any]]] = [
            [asdict(neighbour) for neighbour in neighbours]
            for neighbours in self._retriever.search(rows.embeddings, spec.depth, rows.image_ids)
        ]
        write_part(storage.join(spec.out, part.split, part.name), candidate_table(rows.image_ids, candidates))
        return len(rows.image_ids)


def count_leaks(features: StoreManifest, folders: tuple[str, str]) -> int:
    """Returns how many training images have a candidate with the text of one of their own captions.

    A few are chance: short captions are written more than once. Many mean that the image ids in the index do not match
    those of the images, so that no captions were left out.

    Args:
        features: The images.
        folders: The folder of features and the folder of candidates.
    """
    leaks = 0
    for part in features.parts_of("train"):
        rows = read_queries(storage.join(folders[0], part.split, part.name))
        candidates = read_candidates(storage.join(folders[1], part.split, part.name))
        for captions, texts in zip(rows.captions, candidates, strict=True):
            leaks += not set(captions).isdisjoint(texts)
    return leaks
