from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from index_builder.cleaning import Cleaner, Deduplicator, caption_key
from index_builder.dump_formats import DumpRow
from smallcap.config import CleaningConfig


def test_key_ignores_case_unicode_form_and_white_space() -> None:
    assert caption_key("A  Café\u3000dog ") == caption_key("a cafe\u0301 DOG")
    assert caption_key("straße") == caption_key("STRASSE")
    assert caption_key("a dog") != caption_key("a dog .")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_collapsing_white_space_keeps_the_key(text: str) -> None:
    assert caption_key(" ".join(text.split())) == caption_key(text)


def test_every_row_is_kept_or_counted() -> None:
    rows = [
        DumpRow(" A  dog\truns ", "a", 1),
        DumpRow("", None, 2, "malformed"),
        DumpRow(" \u3000\n", "b", 3),
        DumpRow("dog", "b", 4),
        DumpRow("a b c d e", "b", 5),
        DumpRow("half \ud83d pair", "b", 6),
        DumpRow("half pair", "\ud83d", 7),
    ]
    kept, dropped = Cleaner(CleaningConfig(max_tokens=4, min_words=2)).clean(rows)
    assert [(row.text, row.image_id) for row in kept] == [("A dog runs", "a")]
    assert dropped == {"malformed": 3, "empty": 1, "too_few_words": 1, "too_long": 1}


def test_first_text_is_kept_with_every_image() -> None:
    unique = Deduplicator()
    for source, text, image in [
        (0, "A dog", "a"),
        (0, "a dog", None),
        (1, "a DOG", "b"),
        (1, "A cat", None),
        (2, "a dog", "a"),
    ]:
        unique.add(caption_key(text), text, source, image)
    by_text = {caption.text: caption for caption in unique.captions()}
    assert list(by_text["A dog"].image_ids) == ["a", "b"]
    assert by_text["A dog"].source == 0
    assert list(by_text["A cat"].image_ids) == []
    assert unique.duplicates == 3
    assert [caption.key for caption in unique.captions()] == sorted(caption.key for caption in unique.captions())
