"""Owns the scenes of the demo world and how people would caption them.

This includes the kinds of objects (`kinds.csv`), sets of scenes, grounds, sizes, layouts, the phrasings of captions,
and the parser that finds objects in a caption. It knows nothing of fonts or models: `demo.render` draws a scene.
"""

import csv
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

KINDS_FILE = Path(__file__).with_name("kinds.csv")

TRAINING_DOMAINS = ("animals", "food", "clothing", "household", "play", "nature")
HELD_OUT_DOMAINS = ("creatures", "produce", "vehicles", "tools")  # never shown to cross-attention's training


@dataclass(frozen=True)
class SceneSet:
    """Scenes for one purpose: a scene is its seed, so sets with disjoint seeds share no scene."""

    name: str
    seeds: range
    domains: tuple[str, ...]


WEB = SceneSet("web", range(1_000_000), TRAINING_DOMAINS + HELD_OUT_DOMAINS)  # for CLIP and GPT-2
TRAINING = SceneSet("training", range(1_000_000, 2_000_000), TRAINING_DOMAINS)  # for cross-attention, and its datastore
OTHER = SceneSet("other", range(2_000_000, 3_000_000), HELD_OUT_DOMAINS)  # the held-out domains' own datastore
TEST = SceneSet("test", range(10_000_000, 11_000_000), TRAINING_DOMAINS)
OTHER_TEST = SceneSet("other-test", range(11_000_000, 12_000_000), HELD_OUT_DOMAINS)
SCENE_SETS = (WEB, TRAINING, OTHER, TEST, OTHER_TEST)

GROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (205, 92, 88),
    "blue": (96, 140, 205),
    "green": (120, 178, 112),
    "yellow": (238, 218, 128),
    "purple": (160, 120, 190),
    "pink": (240, 180, 200),
    "gray": (150, 150, 150),
    "white": (240, 240, 238),
    "black": (45, 45, 50),
    "brown": (150, 112, 82),
}
SIZES = {"small": 0.31, "medium": 0.42, "large": 0.56}  # longer side of the object / side of the image
NUMBER_WORDS = {2: "two", 3: "three"}

# Centres of the objects (x, y in shares of the side), in reading order: left to right, top to bottom.
LAYOUTS: dict[str, tuple[tuple[float, float], ...]] = {
    "alone": ((0.5, 0.5),),
    "beside": ((0.27, 0.5), (0.73, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "row": ((0.17, 0.5), (0.5, 0.5), (0.83, 0.5)),
    "column": ((0.5, 0.17), (0.5, 0.5), (0.5, 0.83)),
    "one_above_two": ((0.5, 0.27), (0.26, 0.73), (0.74, 0.73)),
    "two_above_one": ((0.26, 0.27), (0.74, 0.27), (0.5, 0.73)),
}
LAYOUTS_BY_COUNT = {1: ("alone",), 2: ("beside", "above"), 3: ("row", "column", "one_above_two", "two_above_one")}
COUNT_SHARES = {1: 0.35, 2: 0.45, 3: 0.2}
ALIKE_SHARE = 0.2  # of the scenes with two objects: both are of one kind; three always are
GROUND_NAMED_SHARE = 0.5  # of the captions name the ground


@dataclass(frozen=True)
class Kind:
    """One row of `kinds.csv`: a kind of object, its names, and the emoji that draws it."""

    noun: str
    article: str
    plural: str
    domain: str
    character: str


@dataclass(frozen=True)
class PlacedObject:
    """An object in a scene: centre and longer side in shares of the image's side, tilt in degrees."""

    kind: Kind
    size: str
    x: float
    y: float
    scale: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """One or two objects of one domain, or three of one kind, in a layout on a coloured ground."""

    seed: int
    ground: str
    layout: str
    objects: tuple[PlacedObject, ...]

    @property
    def domain(self) -> str:
        """The domain of all its objects."""
        return self.objects[0].kind.domain

    @property
    def kinds(self) -> Counter[str]:
        """The nouns of the objects, with how often each occurs."""
        return Counter(placed.kind.noun for placed in self.objects)


@cache
def load_kinds() -> tuple[Kind, ...]:
    """Reads the table of kinds; add a row to `kinds.csv` to add a kind."""
    with KINDS_FILE.open(encoding="utf-8", newline="") as table:
        return tuple(
            Kind(row["noun"], row["article"], row["plural"], row["domain"], chr(int(row["codepoint"], 16)))
            for row in csv.DictReader(table)
        )


@cache
def kinds_of(domain: str) -> tuple[Kind, ...]:
    """Returns the kinds of one domain, in the table's order."""
    return tuple(kind for kind in load_kinds() if kind.domain == domain)


def sample_scene(seed: int) -> Scene:
    """Returns the scene of a seed, the same on every machine.

    Raises:
        ValueError: No set in SCENE_SETS has the seed.
    """
    domains = next((scenes.domains for scenes in SCENE_SETS if seed in scenes.seeds), None)
    if domains is None:
        raise ValueError(f"seed {seed} is in none of {', '.join(f'{s.name} {s.seeds}' for s in SCENE_SETS)}")
    rng = random.Random(seed)
    domain = rng.choice(domains)
    count = rng.choices(list(COUNT_SHARES), weights=list(COUNT_SHARES.values()))[0]
    layout = rng.choice(LAYOUTS_BY_COUNT[count])
    ground = rng.choice(list(GROUNDS))
    kinds = _sample_kinds(kinds_of(domain), count, rng)
    sizes = _sample_sizes(count, rng)
    objects = tuple(
        _place(kind, size, centre, 0.08 if count == 1 else 0.02, rng)
        for kind, size, centre in zip(kinds, sizes, LAYOUTS[layout], strict=True)
    )
    return Scene(seed, ground, layout, objects)


def scenes_of(scenes: SceneSet, count: int, first: int = 0) -> list[Scene]:
    """Returns `count` scenes of a set, from its `first` on."""
    return [sample_scene(seed) for seed in scenes.seeds[first : first + count]]


def _sample_kinds(pool: Sequence[Kind], count: int, rng: random.Random) -> list[Kind]:
    """Two different kinds, or one kind once or several times."""
    kinds = rng.sample(pool, 2)
    return kinds if count == 2 and rng.random() >= ALIKE_SHARE else kinds[:1] * count


def _sample_sizes(count: int, rng: random.Random) -> list[str]:
    """One object has any size; two may differ in size; three share the room evenly."""
    if count == 1:
        return [rng.choice(list(SIZES))]
    if count == 2 and rng.random() < 0.4:
        return rng.sample(["small", "large"], 2)
    return ["medium" if count == 2 else "small"] * count


def _place(kind: Kind, size: str, centre: tuple[float, float], jitter: float, rng: random.Random) -> PlacedObject:
    scale = SIZES[size] * rng.uniform(0.92, 1.08)
    low, high = scale / 2, 1 - scale / 2
    x, y = (min(max(c + rng.uniform(-jitter, jitter), low), high) for c in centre)
    return PlacedObject(kind, size, x, y, scale, rng.uniform(-10, 10))


# --- captions ------------------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: random.Random) -> str:
    """Returns one caption of the scene: lower-case, without a final stop, with every object once, in reading order.

    Objects of one kind are counted (`two dogs`), not named one after another.
    """
    alike = len(scene.objects) > 1 and len(scene.kinds) == 1
    phrase = _say(scene, rng.choice((_ALIKE_PHRASINGS if alike else _PHRASINGS)[scene.layout]), rng)
    opening = rng.choice(["", "", "", "", "a picture of ", "there is ", "we see "])
    if not phrase.startswith(("a ", "an ", "two ", "three ")):
        opening = ""
    if opening == "there is " and phrase.startswith(("two ", "three ")):
        opening = "there are "
    ending = rng.choice(_GROUND_ENDINGS).format(scene.ground) if rng.random() < GROUND_NAMED_SHARE else ""
    return opening + phrase + ending


def captions_of(scene: Scene, count: int, salt: str = "caption") -> list[str]:
    """Returns `count` different captions of a scene; the same arguments give the same captions."""
    rng = random.Random(f"{salt}-{scene.seed}")
    captions: list[str] = []
    while len(captions) < count:
        caption = describe(scene, rng)
        if caption not in captions:
            captions.append(caption)
    return captions


def _say(scene: Scene, templates: Sequence[str], rng: random.Random) -> str:
    """Fills one of the templates: `{0}` and `{1}` are the objects in turn."""
    first, *others = scene.objects
    if templates is _SIZED and first.size == others[0].size:
        templates = _LISTED
    template = templates[0] if len(templates) == 1 else rng.choice(templates)
    names = [f"{placed.kind.article} {placed.kind.noun}" for placed in scene.objects]
    sized = [
        name if placed.size == "medium" else f"a {placed.size} {placed.kind.noun}"
        for name, placed in zip(names, scene.objects, strict=True)
    ]
    return template.format(
        *names,
        sized=sized,
        count=f"{NUMBER_WORDS.get(len(scene.objects), 'one')} {first.kind.plural}",
    )


_GROUND_ENDINGS = (" on a {} ground", " on a {} background", " on {}", " in front of a {} wall")
_LISTED = ("{0} and {1}",)
_SIZED = ("{sized[0]} and {sized[1]}", "{sized[0]} with {sized[1]}")  # two objects of one size take _LISTED
_BESIDE = ("{0} to the left of {1}", "{0} on the left and {1} on the right", "{0} next to {1}", "{0} beside {1}")
_PHRASINGS: dict[str, Sequence[Sequence[str]]] = {
    "alone": (("{0}", "{sized[0]}", "just {sized[0]}"),),
    "beside": (_BESIDE, _BESIDE, _LISTED, _SIZED),
    "above": (("{0} above {1}",), _LISTED, _SIZED),
}
_ACROSS: Sequence[Sequence[str]] = (("{count}",), ("{count} side by side", "{count} in a row"))
_DOWN: Sequence[Sequence[str]] = (("{count}",), ("{count} one above the other", "{count} in a column"))
_ALIKE_PHRASINGS = {"beside": _ACROSS, "above": _DOWN, "row": _ACROSS, "column": _DOWN}
_ALIKE_PHRASINGS |= dict.fromkeys(("one_above_two", "two_above_one"), _ACROSS[:1])


# --- reading captions back -----------------------------------------------------------------------------------------


@cache
def _nouns_by_word() -> dict[str, str]:
    return {word: kind.noun for kind in load_kinds() for word in (kind.noun, kind.plural)}


def named_kinds(caption: str) -> Counter[str]:
    """Returns the objects that a caption names, with their numbers, by noun.

    The number word before a noun gives its number (`two dogs`); without one it is one.
    """
    noun_of, numbers = _nouns_by_word(), {word: number for number, word in NUMBER_WORDS.items()}
    named: Counter[str] = Counter()
    number = 1
    for word in re.findall(r"[a-z]+", caption.lower()):
        if word in noun_of:
            named[noun_of[word]] += number
            number = 1
        elif word in numbers:
            number = numbers[word]
    return named
