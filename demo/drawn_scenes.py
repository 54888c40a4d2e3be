"""Owns test scenes that no training saw: their images, their references, and whether a caption names their objects."""

from dataclasses import dataclass

from demo.datastore import FIRST_MEASURED, REFERENCES_PER_IMAGE
from demo.render import encode_jpeg
from demo.world import Scene, SceneSet, captions_of, named_kinds, scenes_of
from smallcap.captioner import Captioner

BATCH_SIZE = 64


@dataclass(frozen=True)
class DrawnScenes:
    """Rendered test scenes with their reference captions."""

    scenes: list[Scene]
    images: list[bytes]  # JPEG
    references: dict[str, list[str]]  # by the scene's seed

    @classmethod
    def render(cls, scene_set: SceneSet, count: int) -> "DrawnScenes":
        """Renders `count` scenes of a set that are not among the shipped images."""
        scenes = scenes_of(scene_set, count, FIRST_MEASURED)
        references = {str(scene.seed): captions_of(scene, REFERENCES_PER_IMAGE) for scene in scenes}
        return cls(scenes, [encode_jpeg(scene) for scene in scenes], references)

    def caption(self, captioner: Captioner) -> list[str]:
        """Returns a caption for each scene."""
        batches = [self.images[start : start + BATCH_SIZE] for start in range(0, len(self.images), BATCH_SIZE)]
        return [result.caption or "" for batch in batches for result in captioner.caption(batch)]


def is_right(scene: Scene, caption: str) -> bool:
    """Says whether a caption names exactly the scene's objects, each as often as it occurs."""
    return named_kinds(caption) == scene.kinds
