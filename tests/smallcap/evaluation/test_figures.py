"""Figures of runs made here: which images count, what differs between two runs, what is novel."""

import random

import pytest

from smallcap.errors import ConfigError
from smallcap.evaluation.caption_metrics import score_captions
from smallcap.evaluation.figures import evaluate_runs, expand_metrics
from smallcap.evaluation.references import ReferenceImage, References
from smallcap.evaluation.run_captions import VALUES, RunCaptions

METRICS = ["cider", "bleu_4"]
_WORDS = ("a", "the", "red", "blue", "dog", "cat", "car", "runs", "sits", "on", "under", "near", "beach", "street")


def references(count: int) -> References:
    generator = random.Random(0)
    texts = [tuple(" ".join(generator.choices(_WORDS, k=8)) for _ in range(3)) for _ in range(count)]
    return References((ReferenceImage(f"{image}.jpg", texts[image]) for image in range(count)), "refs.csv")


def run_of(captions: dict[str, str], **values: float) -> RunCaptions:
    defaults = {"clip_cosine": 0.4, "retrieval_recall": 0.5, "copied_share": 0.2, "copied": 0.0}
    defaults |= {"words": 8.0, "tokens": 10.0} | values
    return RunCaptions(captions, dict.fromkeys(captions, tuple(defaults[name] for name in VALUES)), len(captions))


def first_of(refs: References) -> dict[str, str]:
    return {image: captions[0] for image, captions in refs.captions.items()}


def shuffled(refs: References) -> dict[str, str]:
    captions = list(first_of(refs).values())
    return dict(zip(refs.captions, captions[1:] + captions[:1], strict=True))


def test_a_run_has_every_figure_with_an_interval() -> None:
    refs = references(60)
    evaluation = evaluate_runs([run_of(shuffled(refs), clip_cosine=-0.2)], refs, METRICS, resamples=200)
    figures = evaluation.runs[0].figures
    others = ["clip_score", "clip_cosine", "retrieval_recall", "copied_share", "copied", "novel", "words", "tokens"]
    assert list(figures) == [*METRICS, *others]
    expected = score_captions(shuffled(refs), refs.captions, METRICS)
    for name, scores in expected.items():
        figure = figures[name]
        assert figure.value == scores.mean
        assert figure.low is not None and figure.high is not None
        assert figure.low < scores.mean < figure.high
    assert (figures["clip_score"].value, figures["clip_cosine"].value) == (0, pytest.approx(-0.2))  # 2.5 · max(cos, 0)
    assert (evaluation.images, evaluation.captions_per_image, evaluation.runs[0].differences) == (60, 3, {})
    assert evaluation.runs[0].lengths.words == {"p5": 8, "p25": 8, "p50": 8, "p75": 8, "p95": 8}


def test_two_runs_are_compared_on_the_images_that_both_have() -> None:
    refs = references(60)
    good, bad = first_of(refs), shuffled(refs)
    del good["0.jpg"], bad["1.jpg"]
    evaluation = evaluate_runs([run_of(bad), run_of(good)], refs, METRICS, resamples=200)
    assert evaluation.images == 58
    cider = evaluation.runs[1].differences["cider"]
    both = [run.figures["cider"].value for run in evaluation.runs]
    assert cider.value == pytest.approx(both[1] - both[0])
    assert cider.low is not None and cider.low > 0  # surely better
    assert evaluation.runs[1].differences["words"].value == 0
    three = evaluate_runs([run_of(bad), run_of(bad), run_of(good)], refs, METRICS, resamples=200).runs
    equal, better = (run.differences["cider"] for run in three[1:])
    assert (equal.value, equal.low, equal.high) == (0, 0, 0)  # for sure
    assert better.value == pytest.approx(cider.value)


def test_the_datastore_says_what_is_novel() -> None:
    refs = references(4)
    captions = dict(zip(refs.captions, ["A dog.", "a cat", "a car", "a bus"], strict=True))
    without = evaluate_runs([run_of(captions, copied=float("nan"))], refs, [], 0)
    assert without.runs[0].figures["novel"].value is None  # nothing was retrieved, and no datastore is known
    datastore = [["a dog", "other"], ["The cat"], ["a car!"]]
    evaluation = evaluate_runs([run_of(captions, copied=float("nan"))], refs, [], 0, datastore=datastore)
    assert evaluation.runs[0].figures["novel"].value == 0.5  # the cat and the bus
    assert evaluation.runs[0].figures["copied"].value is None
    assert evaluation.tokenizer is None


def test_few_images_are_warned_of() -> None:
    few, enough = references(49), references(50)
    assert "here 49" in evaluate_runs([run_of(shuffled(few))], few, METRICS, 0).warnings[0]
    assert evaluate_runs([run_of(shuffled(enough))], enough, METRICS, 0).warnings == ()
    assert evaluate_runs([run_of(shuffled(few))], few, ["bleu_4"], 0).warnings == ()


def test_no_image_in_common_is_an_error_that_shows_names() -> None:
    refs = references(3)
    run = RunCaptions(rows=1, unmatched=1, examples=["photo-17"])
    with pytest.raises(ConfigError) as error:
        evaluate_runs([run], refs)
    assert (error.value.expected, error.value.found) == ("images named 0.jpg, 1.jpg, 2.jpg", "photo-17")


def test_bleu_means_its_four_orders() -> None:
    assert expand_metrics(["bleu", "cider"]) == ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4"]
