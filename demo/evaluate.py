"""How often the demo's captions name exactly the objects that a test scene has.

Renders scenes that no training saw, captions them through `smallcap.Captioner` with the index of `demo/captions.csv`,
reads the objects out of each caption and compares them, with their counts, with the scene's. The last line is JSON.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.datastore import FIRST_MEASURED
from demo.render import encode_jpeg
from demo.world import TEST, Scene, named_kinds, scenes_of
from jobs.demo import build_demo_index
from smallcap.captioner import Captioner

BATCH_SIZE = 32


@dataclass(frozen=True)
class SceneResult:
    """One scene with what the model said of it."""

    scene: Scene
    caption: str

    @property
    def right(self) -> bool:
        """Whether the caption names the scene's objects, each as often as it is there, and no other."""
        return named_kinds(self.caption) == self.scene.kinds


@dataclass(frozen=True)
class Report:
    """Shares of scenes with all objects right."""

    scenes: int
    right: float
    right_by_objects: dict[int, float]
    objects_found: float
    seconds: float


def caption_scenes(captioner: Captioner, scenes: list[Scene]) -> Iterator[SceneResult]:
    """Captions rendered scenes, a batch at a time."""
    for start in range(0, len(scenes), BATCH_SIZE):
        batch = scenes[start : start + BATCH_SIZE]
        for scene, result in zip(batch, captioner.caption([encode_jpeg(scene) for scene in batch]), strict=True):
            yield SceneResult(scene, result.caption or "")


def summarise(results: list[SceneResult], seconds: float) -> Report:
    """Counts what was right, over all scenes and by the number of objects."""
    by_objects: dict[int, list[bool]] = defaultdict(list)
    for result in results:
        by_objects[len(result.scene.objects)].append(result.right)
    found = sum((named_kinds(result.caption) & result.scene.kinds).total() for result in results)
    return Report(
        scenes=len(results),
        right=round(sum(result.right for result in results) / len(results), 4),
        right_by_objects={count: round(sum(right) / len(right), 4) for count, right in sorted(by_objects.items())},
        objects_found=round(found / sum(result.scene.kinds.total() for result in results), 4),
        seconds=round(seconds, 1),
    )


def print_report(report: Report, results: list[SceneResult], wrong_shown: int = 8) -> None:
    """Prints the shares and some of the wrong captions; the last line is the report as JSON."""
    print(f"{report.scenes} test scenes: all objects right in {report.right:.1%} ({report.seconds:.0f} s)")
    for count, share in report.right_by_objects.items():
        print(f"  with {count} object{'s' if count > 1 else ''}: {share:.1%}")
    print(f"objects found: {report.objects_found:.1%}")
    for result in [result for result in results if not result.right][:wrong_shown]:
        print(f"  wrong: {', '.join(result.scene.kinds.elements())} -> {result.caption!r}")
    print(json.dumps(asdict(report)))


def evaluate(captioner: Captioner, scene_count: int, report_file: Path | None = None) -> Report:
    """Measures a captioner on scenes of the training domains that no training saw, prints the report and returns it."""
    scenes = scenes_of(TEST, scene_count, FIRST_MEASURED)
    start = time.perf_counter()
    results = list(caption_scenes(captioner, scenes))
    report = summarise(results, time.perf_counter() - start)
    if report_file is not None:
        report_file.write_text(json.dumps(asdict(report)) + "\n", encoding="utf-8")
    print_report(report, results)
    return report


def main() -> None:
    """Measures the demo model on test scenes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="demo", help="`demo`, or a folder with a SmallCap checkpoint")
    parser.add_argument("--index", default="out/demo/index", help="index of demo/captions.csv, built if need be")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    index = build_demo_index(arguments.index).index_uri
    captioner = Captioner.from_pretrained(arguments.model, index, num_beams=arguments.num_beams)
    evaluate(captioner, arguments.scenes, arguments.json)


if __name__ == "__main__":
    main()
