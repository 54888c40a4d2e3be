import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.dumps.filters import Blocklist, holds_markup, holds_repeats, holds_url, load_blocklist
from smallcap.captions.normal_form import normalise
from smallcap.errors import ConfigError

CLEAN = [
    "A child in a pink dress is climbing up a set of stairs in an entry way .",
    "a < b and b > c",
    "3 > 2 but 2 <3",
    "I <3 my dog",
    "AT&T store; R&B; Dolce&Gabbana; and M&Ms;",
    "awww.cute.puppies on a sofa",
    "the letters www on a wall",
    "a sign that reads http",
    "um cachorro na praia.com uma bola",
    "a cat or a dog.It is sleeping",
    "an asp.net book and/or a lamp.org",
    "Zzz, the cat sleeps... or not......",
    "10000 people, 1000000000000 stars, 1,000,000,000,000,000,000 grains",
    "sooooo cute, hahaha, xoxoxo, ★★★★★",
    "<unk> riding a horse, <person> next to <number> cows",
    "figure [a], [b] and [i], a sign saying [sic](laughs)",
    "好好好吃的饭，哈哈哈哈",
    "人人人の森……・・・・・・・・・・",
    "สุนัขวิ่งเล่นบนชายหาด 5555555555 มากกกก",
    "كلب يركض على الشاطئ الجميـــــــــــــــل",
    "समुद्र तट पर दौड़ता हुआ कुत्ता",
    "사람이 개와 함께 해변을 걷고 있다 ㅋㅋㅋㅋ",
    "",
]


@pytest.mark.parametrize("text", CLEAN)
def test_no_filter_drops_captions_of_any_language(text: str) -> None:
    assert not any(finds(text) for finds in FOUND)


FOUND = {
    holds_url: [
        "see https://example.com/a.jpg",
        "FTP://files",
        "图片来自http://例子.中国/图",
        "photo by WWW.Example.co.uk",
        "صورة من www.مثال.com",
        "more at example.com/dogs",
    ],
    holds_markup: [
        "a <b>big</b> dog",
        "a dog<br/>a cat",
        "a dog <BR>",
        'a <a href="x">dog</a>',
        "a <font color=red>dog",
        '<my-tag data-x="1">dog',
        "a dog </item>",
        "<!-- a dog",
        "<!DOCTYPE html>",
        "dogs &amp; cats",
        "caf&eacute;",
        "it&#39;s",
        "&#x27;",
        "[b]dog[/b]",
        "[url=http]dog",
        "[IMG]dog",
        "![a dog](img/dog.png)",
        "[dog](https:example)",
        "一只[狗](./狗.png)",
    ],
    holds_repeats: [
        "aaaaaaaa",
        "wow!!!!!!!!",
        "a dog ----------",
        "hahahahahahaha",
        "ha ha ha ha ha ha ha",
        "哈哈哈哈哈哈哈哈",
        "买它买它买它买它买它买它",
    ],
}


@pytest.mark.parametrize(("finds", "text"), [(finds, text) for finds, texts in FOUND.items() for text in texts])
def test_each_filter_finds_its_kind(finds: Callable[[str], bool], text: str) -> None:
    assert finds(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["<", "<a ", "<a b=", "[", "[a](", "[url=", "&", "www.", "ab", "a" * 7 + "b", "://"])
def test_long_garbage_takes_no_long_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    assert {finds(text) for finds in FOUND} <= {True, False}


def test_blocklist_finds_whole_words_and_phrases(tmp_path: Path) -> None:
    blocklist = Blocklist(["Cat", "stock  photo", "straße 7", "狗", "T恤", "หมา", "कम", "Ｓale"])
    found = [
        "a CAT.",
        "a cat's tail",
        "a Stock-Photo of",
        "STRASSE 7",
        "一只小狗在跑",
        "白色t恤",
        "มีหมาสองตัว",
        "कम पानी",
        "sale",
    ]
    missed = [
        "concatenate",
        "cats",
        "stock of photos",
        "photo stock",
        "strasse 77",
        "猫",
        "恤t",
        "มา",
        "कमी",
        "sales",
        "",
    ]
    assert [text for text in found if not blocklist.matches(normalise(text))] == []
    assert [text for text in missed if blocklist.matches(normalise(text))] == []
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffcat\r\n# dog\r\n\r\n  stock photo \r\n".encode())
    assert [load_blocklist(str(path)).matches(text) for text in ("a cat", "stock photo", "a dog")] == [
        True,
        True,
        False,
    ]


WORDS = st.lists(st.sampled_from(["a", "b", "ab", "é", "7"]), min_size=1, max_size=4)


@given(st.lists(WORDS, max_size=5), st.lists(st.sampled_from(["a", "b", "ab", "É", "e\u0301", "7", "."]), max_size=9))
def test_blocklist_is_a_search_for_padded_phrases(phrases: list[list[str]], words: list[str]) -> None:
    blocklist = Blocklist(" ".join(phrase) for phrase in phrases)
    text = " ".join(word for word in words if word != ".").lower()
    naive = any(f" {' '.join(phrase)} " in f" {unicodedata.normalize('NFC', text)} " for phrase in phrases)
    assert blocklist.matches(normalise(" ".join(words))) == naive


HAN = st.text(st.sampled_from("一二三"), min_size=1, max_size=3)


@given(st.lists(HAN, max_size=5), st.text(st.sampled_from("一二三"), max_size=9))
def test_blocklist_of_han_is_a_search_for_substrings(phrases: list[str], text: str) -> None:
    assert Blocklist(phrases).matches(text) == any(phrase in text for phrase in phrases)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "blocklist does not exist"),
        (b"", "is empty"),
        (b"# only\n\n", "is empty"),
        (b"cat\ncaf\xe9\n", r"not UTF-8(.|\n)*line 2(.|\n)*0xe9"),
        (b"cat\n!!!\n", r"has no word(.|\n)*line 2"),
    ],
)
def test_blocklists_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_blocklist(str(path))
