"""The demo world: what a caption says is what the scene has."""

import random
from collections import Counter

import pytest

from demo.world import (
    HELD_OUT_SEEDS,
    LAYOUTS,
    LAYOUTS_BY_COUNT,
    TRAIN_SEEDS,
    captions_of,
    describe,
    load_kinds,
    named_kinds,
    sample_scene,
)


def test_kinds_are_distinct_single_words() -> None:
    kinds = load_kinds()
    words = [word for kind in kinds for word in {kind.noun, kind.plural}]
    assert len(kinds) >= 90
    assert len({kind.domain for kind in kinds}) >= 8
    assert len(set(words)) == len(words)
    assert len({kind.character for kind in kinds}) == len(kinds)
    assert all(kind.noun.isalpha() and kind.noun.islower() for kind in kinds)


def test_articles_fit_their_nouns() -> None:
    for kind in load_kinds():
        assert kind.article == ("an" if kind.noun[0] in "aeiou" else "a"), kind


@pytest.mark.parametrize("seeds", [TRAIN_SEEDS[:400], HELD_OUT_SEEDS[:400]])
def test_every_caption_names_exactly_the_objects_of_its_scene(seeds: range) -> None:
    for seed in seeds:
        scene = sample_scene(seed)
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


def test_training_and_held_out_seeds_are_disjoint() -> None:
    assert not set(TRAIN_SEEDS) & set(HELD_OUT_SEEDS)


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
