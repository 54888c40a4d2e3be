"""The counting of right captions; no model is run."""

from demo.drawn_scenes import is_right
from demo.evaluate import summarise
from demo.world import captions_of, sample_scene


def test_a_caption_is_right_only_with_all_objects_and_no_other() -> None:
    scene = next(scene for scene in map(sample_scene, range(100)) if len(scene.objects) == len(scene.kinds) == 2)
    first, second = scene.kinds
    other = next(noun for noun in ("dog", "cat", "owl") if noun not in scene.kinds)
    assert is_right(scene, f"a {second} next to a {first}")
    assert not is_right(scene, f"a {first} on red")
    assert not is_right(scene, f"a {first}, a {second} and a {other}")
    assert not is_right(scene, f"two {scene.objects[0].kind.plural} and a {second}")


def test_the_report_counts_scenes_and_objects() -> None:
    scenes = [sample_scene(seed) for seed in range(40)]
    captions = [captions_of(scene, 1)[0] if row % 4 else "" for row, scene in enumerate(scenes)]
    report = summarise(scenes, captions, seconds=2.0)
    assert (report.scenes, report.right) == (40, 0.75)
    assert set(report.right_by_objects) == {1, 2, 3}
    named = sum(len(scene.objects) for row, scene in enumerate(scenes) if row % 4)
    assert report.objects_found == round(named / sum(len(scene.objects) for scene in scenes), 4)
