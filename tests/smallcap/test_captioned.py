"""How results look: short as text, and escaped as HTML, for captions and ids come from outside."""

import numpy as np

from smallcap.captioned import CaptionResult, ScoredCaption
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
