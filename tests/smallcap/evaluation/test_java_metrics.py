"""METEOR against pycocoevalcap, which has the Java program compute the figures; and what a machine lacks for either."""

import random

import pytest

from smallcap.evaluation.java_metrics import compute_meteor, score_meteor, what_metric_lacks
from smallcap.evaluation.java_tools import has_java, pycocoevalcap_folder

needs_java = pytest.mark.skipif(not has_java(), reason="no Java runs here")

_WORDS = ("a", "the", "dog", "dogs", "puppy", "man", "runs", "running", "beach", "shore", "on", "near", "caf\u00e9")


def captions(count: int) -> tuple[list[str], list[list[str]]]:
    """Tokenised captions with references: some equal, some empty, some with synonyms and other forms of words."""
    generator = random.Random(0)

    def caption() -> str:
        return " ".join(generator.choices(_WORDS, k=generator.randint(1, 9)))

    references = [[caption() for _ in range(generator.randint(1, 5))] for _ in range(count)]
    return ["", references[1][0], *(caption() for _ in range(count - 2))], references


@needs_java
@pytest.mark.slow
def test_meteor_is_pycocoevalcaps_for_each_image_and_for_the_set() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    candidates, references = captions(40)
    statistics = score_meteor(candidates, references)
    mean, per_image = Meteor().compute_score(
        dict(enumerate(references)), {image: [text] for image, text in enumerate(candidates)}
    )
    assert statistics.value == pytest.approx(mean, abs=1e-12)
    assert compute_meteor(statistics.counts) == pytest.approx(per_image, abs=1e-12)
    assert per_image[:2] == [0, 1]


def test_only_meteor_and_spice_lack_anything() -> None:
    assert what_metric_lacks("cider") == what_metric_lacks("bleu_4") == what_metric_lacks("rouge_l") == ""


@needs_java
def test_spice_says_how_to_fetch_what_it_lacks() -> None:
    if list((pycocoevalcap_folder() / "spice" / "lib").glob("stanford-corenlp-*")):
        pytest.skip("SPICE has what it needs here")
    assert "python -c" in what_metric_lacks("spice")
    assert what_metric_lacks("meteor") == ""
