"""The demo world: what a caption says is what the scene has."""

import itertools
import random
import re
from collections import Counter

import pytest

from demo.world import (
    HELD_OUT_DOMAINS,
    LAYOUTS,
    LAYOUTS_BY_COUNT,
    OTHER,
    SCENE_SETS,
    TEST,
    TRAINING_DOMAINS,
    SceneSet,
    captions_of,
    describe,
    load_kinds,
    named_kinds,
    sample_scene,
    scenes_of,
)


def test_kinds_are_distinct_single_words() -> None:
    kinds = load_kinds()
    words = [word for kind in kinds for word in {kind.noun, kind.plural}]
    assert len(kinds) >= 250
    assert len({kind.domain for kind in kinds}) >= 8
    assert len(set(words)) == len(words)
    assert len({kind.character for kind in kinds}) == len(kinds)
    assert all(kind.noun.isalpha() and kind.noun.islower() for kind in kinds)


def test_articles_fit_their_nouns() -> None:
    spoken_otherwise = {"hourglass": "an", "ufo": "a"}
    for kind in load_kinds():
        by_letter = "an" if kind.noun[0] in "aeiou" else "a"
        assert kind.article == spoken_otherwise.get(kind.noun, by_letter), kind


@pytest.mark.parametrize("scenes", SCENE_SETS, ids=lambda scenes: scenes.name)
def test_every_caption_names_exactly_the_objects_of_its_scene(scenes: SceneSet) -> None:
    for scene in scenes_of(scenes, 400):
        for caption in captions_of(scene, 4):
            assert named_kinds(caption) == scene.kinds, caption
            assert caption == caption.lower() and not caption.endswith(".")


def test_the_parser_reads_plurals_and_ignores_what_is_no_object() -> None:
    assert named_kinds("two dogs above a cat on a red ground") == Counter(dog=2, cat=1)
    assert named_kinds("dogs") == Counter(dog=1)
    assert named_kinds("there is just a small hot-air thing in front of a blue wall") == Counter()


def test_a_scene_follows_from_its_seed_alone() -> None:
    first = [sample_scene(seed) for seed in range(50)]
    assert first == [sample_scene(seed) for seed in range(50)]
    assert len({scene.objects for scene in first}) == 50
    assert captions_of(first[0], 3) == captions_of(first[0], 3)
    assert describe(first[0], random.Random(1)) == describe(first[0], random.Random(1))


def test_no_scene_is_in_two_sets() -> None:
    ranges = sorted((scenes.seeds for scenes in SCENE_SETS), key=lambda seeds: seeds.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))
    with pytest.raises(ValueError, match="is in none of web range"):
        sample_scene(50_000_000)


def test_sets_keep_to_their_domains() -> None:
    assert not set(TRAINING_DOMAINS) & set(HELD_OUT_DOMAINS)
    assert {kind.domain for kind in load_kinds()} == {*TRAINING_DOMAINS, *HELD_OUT_DOMAINS}
    for scenes in SCENE_SETS:
        domains = [{placed.kind.domain for placed in scene.objects} for scene in scenes_of(scenes, 200)]
        assert all(len(of_scene) == 1 for of_scene in domains)
        assert set.union(*domains) == set(scenes.domains)


def test_objects_of_one_kind_are_counted() -> None:
    alike = [scene for scene in scenes_of(TEST, 300) if len(scene.kinds) < len(scene.objects)]
    assert {number for scene in alike for number in scene.kinds.values()} == {2, 3}
    for scene in alike:
        assert all(re.search(r"\b(two|three) ", caption) for caption in captions_of(scene, 4))


def test_some_captions_name_the_ground() -> None:
    captions = [(scene.ground, caption) for scene in scenes_of(OTHER, 200) for caption in captions_of(scene, 2)]
    assert 0.3 < sum(ground in caption.split() for ground, caption in captions) / len(captions) < 0.7


def test_objects_fit_their_layout_and_the_picture() -> None:
    for seed in range(300):
        scene = sample_scene(seed)
        assert scene.layout in LAYOUTS_BY_COUNT[len(scene.objects)]
        assert len(LAYOUTS[scene.layout]) == len(scene.objects)
        for placed in scene.objects:
            assert placed.scale / 2 <= placed.x <= 1 - placed.scale / 2
            assert placed.scale / 2 <= placed.y <= 1 - placed.scale / 2


def test_each_scene_has_several_phrasings() -> None:
    for seed in range(50):
        assert len(set(captions_of(sample_scene(seed), 5))) == 5
