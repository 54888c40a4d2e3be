"""Measures how often the demo's captions name exactly the objects of a test scene.

Scenes that no training saw are rendered, and captioned by `smallcap.Captioner` with the index of `demo/captions.csv`.
The objects that a caption names, and their numbers, are compared with those of the scene.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.drawn_scenes import DrawnScenes, is_right
from demo.world import TEST, Scene, named_kinds
from jobs.demo import build_demo_index
from smallcap.captioner import Captioner

WRONG_SHOWN = 8  # captions


@dataclass(frozen=True)
class Report:
    """Shares of scenes with all objects right."""

    scenes: int
    right: float
    right_by_objects: dict[int, float]
    objects_found: float
    seconds: float


def summarise(scenes: Sequence[Scene], captions: Sequence[str], seconds: float) -> Report:
    """Counts right captions, over all scenes and by the number of objects."""
    by_objects: dict[int, list[bool]] = defaultdict(list)
    for scene, caption in zip(scenes, captions, strict=True):
        by_objects[len(scene.objects)].append(is_right(scene, caption))
    found = sum((named_kinds(caption) & scene.kinds).total() for scene, caption in zip(scenes, captions, strict=True))
    return Report(
        scenes=len(scenes),
        right=round(sum(map(sum, by_objects.values())) / len(scenes), 4),
        right_by_objects={count: round(sum(right) / len(right), 4) for count, right in sorted(by_objects.items())},
        objects_found=round(found / sum(scene.kinds.total() for scene in scenes), 4),
        seconds=round(seconds, 1),
    )


def evaluate(captioner: Captioner, scene_count: int, report_file: Path | None = None) -> None:
    """Measures a captioner on scenes of the training domains that no training saw.

    It prints the shares and the first wrong captions; the last line is the report as JSON.
    """
    drawn = DrawnScenes.render(TEST, scene_count)
    start = time.perf_counter()
    captions = drawn.caption(captioner)
    report = summarise(drawn.scenes, captions, time.perf_counter() - start)
    print(f"{report.scenes} test scenes: all objects right in {report.right:.1%} ({report.seconds:.0f} s)")
    for count, share in report.right_by_objects.items():
        print(f"  with {count} object{'s' if count > 1 else ''}: {share:.1%}")
    print(f"objects found: {report.objects_found:.1%}")
    wrong = [pair for pair in zip(drawn.scenes, captions, strict=True) if not is_right(*pair)]
    for scene, caption in wrong[:WRONG_SHOWN]:
        print(f"  wrong: {', '.join(scene.kinds.elements())} -> {caption!r}")
    line = json.dumps(asdict(report))
    print(line)
    if report_file is not None:
        report_file.write_text(line + "\n", encoding="utf-8")


def main() -> None:
    """Measures the demo model on test scenes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="demo", help="`demo`, or a folder with a SmallCap checkpoint")
    parser.add_argument(
        "--index", default="out/demo/index", help="index of demo/captions.csv; it is built if it does not exist"
    )
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the report")
    arguments = parser.parse_args()
    index = build_demo_index(arguments.index).index_uri
    captioner = Captioner.from_pretrained(arguments.model, index, num_beams=arguments.num_beams)
    evaluate(captioner, arguments.scenes, arguments.json)


if __name__ == "__main__":
    main()
