"""Words that retrieval found, and how diverse captions are."""

import math

import pytest

from smallcap.evaluation.caption_words import Diversity, content_words, measure_diversity, retrieval_recall


def test_content_words_name_what_one_could_see() -> None:
    assert content_words(["a dog is n't on the beach is it", "the dog 's 2 balls"]) == {"dog", "beach", "2", "balls"}


def test_retrieval_recall_is_the_share_of_the_references_words_that_were_retrieved() -> None:
    references = ["a dog on a beach", "a wet dog runs"]  # dog, beach, wet, runs
    assert retrieval_recall(references, ["a dog at the sea", "wet sand"]) == 0.5
    assert retrieval_recall(references, ["the man"]) == 0
    assert math.isnan(retrieval_recall(["it is"], ["a dog"]))


def test_diversity_by_hand() -> None:
    captions = ["a dog runs", "a dog sits", "dog"]
    assert measure_diversity(captions) == Diversity(pytest.approx(4 / 7), pytest.approx(3 / 4), 4)
    assert measure_diversity([""]) == Diversity(0, 0, 0)
