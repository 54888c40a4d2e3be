"""How results look: short as text, and escaped as HTML, for captions and ids come from outside."""

import numpy as np
import pytest

from smallcap.captioned import CaptionResult, ScoredCaption, ScoredCaptions
from smallcap.errors import ErrorCode, RowError
from smallcap.index.retriever import Neighbour

EVIL = "<script>alert('&')</script>"
CAPTIONED = CaptionResult(
    caption=f"a dog {EVIL}",
    logprob=-1.5,
    clip_score=0.31234,
    alternatives=(ScoredCaption(f"a cat {EVIL}", -2.0, 4),),
    neighbours=(Neighbour(7, f"a dog on a beach {EVIL}", 0.875),) * 4,
    embedding=np.ones(512, np.float32),
    width=640,
)
FAILED = CaptionResult(error=RowError(ErrorCode.NOT_FOUND, f"No {EVIL}.", where=f"{EVIL}.jpg", remedy="Look again."))


def test_a_result_as_text_is_its_caption_or_its_error() -> None:
    assert repr(CaptionResult("a dog", clip_score=0.31234)) == "CaptionResult('a dog', clip_score=0.312, neighbours=0)"
    assert repr(CaptionResult("a dog")) == "CaptionResult('a dog', neighbours=0)"
    error = RowError(ErrorCode.NOT_FOUND, "The image does not exist.", where="a.jpg")
    assert repr(CaptionResult(error=error)) == (
        "CaptionResult(error='not_found', 'The image does not exist.', where='a.jpg')"
    )
    assert len(repr([CAPTIONED])) < 120


def test_a_result_as_html_shows_all_texts_and_no_markup_of_theirs() -> None:
    for result, texts in (
        (CAPTIONED, ["a dog", "a cat", "a dog on a beach", "0.31", "0.88"]),
        (FAILED, ["Look again"]),
    ):
        shown = result._repr_html_()
        assert all(text in shown for text in texts)
        assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in shown
        assert "<script" not in shown


def scored(*images: list[str]) -> ScoredCaptions:
    """Captions whose log probability says their place, and whose number of tokens their length."""
    texts = [text for captions in images for text in captions]
    logprobs = np.tile(-np.arange(len(images[0]), dtype=np.float64), (len(images), 1))
    return ScoredCaptions(texts, logprobs, np.array([len(text) for text in texts]).reshape(logprobs.shape))


def test_captions_are_put_in_another_order() -> None:
    ordered = scored(["a", "bb", "ccc"], ["dddd", "e", "ff"]).order_by(np.array([[2, 0], [1, 2]]))
    assert ordered.texts == ["ccc", "a", "e", "ff"]
    assert ordered.logprobs.tolist() == [[-2, 0], [-1, -2]]
    assert ordered.num_tokens.tolist() == [[3, 1], [1, 2]]


def test_an_empty_caption_gives_way_to_the_next_that_has_text() -> None:
    asked = []
    found = {1: ["", "", "third", "fourth"], 3: ["", "", "", ""]}

    def search(images: np.ndarray) -> ScoredCaptions:
        asked.append(images.tolist())
        return scored(*(found[image] for image in images.tolist()))

    filled = scored(["a", ""], ["", ""], ["b", "c"], ["", ""]).fill_empty(search)
    assert asked == [[1, 3]]
    assert filled.texts == ["a", "", "third", "fourth", "b", "c", "", ""]
    assert filled.logprobs.tolist() == [[0, -1], [-2, -3], [0, -1], [0, -1]]
    assert filled.num_tokens.tolist() == [[1, 0], [5, 6], [1, 1], [0, 0]]
    whole = scored(["a"], ["b"])
    assert whole.fill_empty(search) is whole


def test_captions_are_ranked_by_other_scores_and_empty_ones_come_last() -> None:
    captions = scored(["a", "bb", "ccc"], ["", "e", "ff"])
    ranked, best = captions.rank(np.array([0.1, 0.3, 0.3, 0.9, 0.2, 0.4], np.float32), 2)
    assert ranked.texts == ["bb", "ccc", "ff", "e"]  # of equal ones the likelier first
    assert best.tolist() == pytest.approx([0.3, 0.4])
