from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.dumps.cleaning import Cleaner, caption_key, describe_filters
from smallcap.captions.rows import CaptionRow
from smallcap.config import CleaningConfig
from smallcap.errors import ConfigError


def test_key_ignores_case_unicode_form_and_white_space() -> None:
    assert caption_key("A  Café\u3000dog ") == caption_key("a cafe\u0301 DOG")
    assert caption_key("straße") == caption_key("STRASSE")
    assert caption_key("a dog") != caption_key("a dog .")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_collapsing_white_space_keeps_the_key(text: str) -> None:
    assert caption_key(" ".join(text.split())) == caption_key(text)


def test_every_row_is_kept_or_counted() -> None:
    rows = [
        CaptionRow(" A  dog\truns ", "a", 1),
        CaptionRow("", None, 2, "malformed"),
        CaptionRow(" \u3000\n", "b", 3),
        CaptionRow("dog", "b", 4),
        CaptionRow("a b c d e", "b", 5),
        CaptionRow("half \ud83d pair", "b", 6),
        CaptionRow("half pair", "\ud83d", 7),
    ]
    kept, dropped = Cleaner(CleaningConfig(max_tokens=4, min_words=2, tokenizer=None)).clean(rows)
    assert [(row.text, row.image_ids) for row in kept] == [("A dog runs", ("a",))]
    assert dropped == {"malformed": 3, "empty": 1, "too_few_words": 1, "too_long": 1}


def test_a_row_is_dropped_for_the_first_reason_that_holds(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("hairless\n")
    drop, blocklist = ("repeats", "markup", "urls"), str(tmp_path / "words.txt")
    config = CleaningConfig(max_tokens=4, min_words=2, drop=drop, blocklist=blocklist)
    bad = ["https://x.y", "<br>", "aaaaaaaa", "hairless", "and too many tokens"]
    rows = [CaptionRow(" ".join(["x", *bad[first:]]), None, first) for first in range(len(bad))]
    rows += [CaptionRow(" ".join(bad), None, 5, "bad_embedding"), CaptionRow("https://x.y", None, 6)]
    reasons = ["url", "markup", "repeated_characters", "blocklisted", "too_long", "bad_embedding", "too_few_words"]
    cleaner = Cleaner(config)
    assert [list(cleaner.clean([row])[1]) for row in rows] == [[reason] for reason in reasons]
    assert not cleaner.clean([CaptionRow("a dog", None, 7)])[1]
    assert not Cleaner(CleaningConfig()).clean(rows[:1])[1]


def test_tokens_are_counted_by_gpt2_without_a_network_and_embeddings_are_passed_on() -> None:
    rows = [CaptionRow("giraffe " * words, None, words) for words in (12, 13)]
    rows += [CaptionRow("a dog", "x", 1, "", b"\0\1"), CaptionRow("a cat", "x", 2)]
    kept, dropped = Cleaner(CleaningConfig()).clean(rows)
    assert [(len(row.text.split()), row.vector) for row in kept] == [(12, None), (2, b"\0\1"), (2, None)]
    assert dropped == {"too_long": 1}


def test_described_filters_change_with_the_blocklists_content(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    config = CleaningConfig(blocklist=str(path), drop=("urls", "markup", "urls"))
    described = []
    for content in ("cat\n", "dog\n", "cat\n"):
        path.write_text(content)
        described.append(describe_filters(config))
    assert described[0] == described[2] != described[1]
    assert described[0] == {**config.model_dump(mode="json"), "blocklist_sha256": sha256(b"cat\n").hexdigest()}
    assert described[0]["drop"] == describe_filters(config.model_copy(update={"drop": ("markup", "urls")}))["drop"]
    assert describe_filters(CleaningConfig())["blocklist_sha256"] is None
    path.unlink()
    with pytest.raises(ConfigError, match="blocklist does not exist"):
        describe_filters(config)
