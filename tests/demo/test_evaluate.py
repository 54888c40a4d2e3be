"""The counting of right captions; no model is run."""

from demo.evaluate import SceneResult, summarise
from demo.world import captions_of, sample_scene


def test_a_caption_is_right_only_with_all_objects_and_no_other() -> None:
    scene = next(scene for scene in map(sample_scene, range(100)) if len(scene.objects) == len(scene.kinds) == 2)
    first, second = scene.kinds
    other = next(noun for noun in ("dog", "cat", "owl") if noun not in scene.kinds)
    assert SceneResult(scene, f"a {second} next to a {first}").right
    assert not SceneResult(scene, f"a {first} on red").right
    assert not SceneResult(scene, f"a {first}, a {second} and a {other}").right
    assert not SceneResult(scene, f"two {scene.objects[0].kind.plural} and a {second}").right


def test_the_report_counts_scenes_and_objects() -> None:
    scenes = [sample_scene(seed) for seed in range(40)]
    results = [SceneResult(scene, captions_of(scene, 1)[0] if row % 4 else "") for row, scene in enumerate(scenes)]
    report = summarise(results, seconds=2.0)
    assert (report.scenes, report.right) == (40, 0.75)
    assert set(report.right_by_objects) == {1, 2, 3}
    named = sum(len(scene.objects) for row, scene in enumerate(scenes) if row % 4)
    assert report.objects_found == round(named / sum(len(scene.objects) for scene in scenes), 4)
