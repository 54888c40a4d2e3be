"""Filters that drop captions from the web: addresses, markup, repeated characters, and the words of a blocklist.

Every filter is the same for all languages, and would rather miss junk than drop a good caption. Filters see one text at
a time, and know nothing of dumps, counts or their order.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from html.entities import html5

from smallcap import storage
from smallcap.captions.normal_form import normalise
from smallcap.errors import ConfigError

# A scheme, a host that starts with www., or a host of a common domain with a path. A bare host is not enough: without
# the space after a full stop, Portuguese has "na praia.com um homem" and English has "look.at".
_URL = re.compile(
    r"(?:https?|ftp)://[^\s/]|(?<![\w@.-])www\.[\w-]+\.\w|(?<=[^\W_])\.(?:com|net|org)/\w",
    re.IGNORECASE,
)
_URL_MARKS = ("://", "www.", ".com/", ".net/", ".org/")  # every match holds one of these, which are found faster

_HTML_TAGS = (
    "a|abbr|article|b|big|blockquote|body|br|button|center|code|dd|div|dl|dt|em|figcaption|figure|font|footer|form"
    "|h[1-6]|head|header|hr|html|i|iframe|img|input|label|li|link|meta|nav|object|ol|option|p|picture|pre|s|script|section"
    "|select|small|source|span|strike|strong|style|sub|sup|svg|table|tbody|td|textarea|th|thead|title|tr|tt|u|ul|video"
)
# A tag has a name that HTML knows, or an attribute with a value, or it is a closing tag with a name: <unk>, <3, a<b and
# "x < y and y > z" are not tags. The length limits keep a stray < from making the search quadratic.
_TAG = re.compile(
    rf"</?(?:{_HTML_TAGS})\s{{0,3}}/?>"
    r"|</[a-z][\w:.-]{0,40}\s?>"
    r"|<[a-z][\w:.-]{0,40}\s[^<>]{0,200}?[\w-]=[\"'\w][^<>]{0,2000}>"
    r"|<!--|<!doctype\s|<!\[cdata\[|<\?xml\s",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:#\d{1,7};|#[xX][0-9a-fA-F]{1,6};|([A-Za-z][A-Za-z0-9]{1,31};))")  # the name is looked up
_LINK = re.compile(
    # [/url] and [url=…], not the [b] and [i] that label a figure; [text](target), not "[sic](laughs)"
    r"\[/(?:b|i|u|s|url|img|quote|code|size|color|center|list|youtube)\]"
    r"|\[(?:url|img|quote|size|color|font|youtube)=[^\]\s][^\]]{0,500}\]|\[(?:url|img|quote)\]"
    r"|!?\[[^\[\]]{0,500}\]\((?:[a-z][a-z0-9+.-]{1,20}:|/|\.\.?/|\#|[\w.-]{1,100}[./])[^()\s]{1,500}\)",
    re.IGNORECASE,
)

# Digits make numbers; dots make ellipses and leaders; the Arabic tatweel stretches a word to any length. Laughter
# (hahaha, 哈哈哈), stretched words (sooo) and reduplication (好好好) are shorter than these runs.
_NOT_REPEATED = r"\d.…‥·・。．ـ"
_REPEAT = re.compile(rf"([^\s{_NOT_REPEATED}])\1{{7}}|([^{_NOT_REPEATED}]{{2,4}}?)\2{{5}}")


def holds_url(text: str) -> bool:
    """Returns whether a text holds a web address: with a scheme, with `www.`, or a com, net or org host with a path."""
    lowered = text.lower()
    return any(mark in lowered for mark in _URL_MARKS) and _URL.search(text) is not None


def holds_markup(text: str) -> bool:
    """Returns whether a text holds HTML or XML tags, character entities, BBCode or a markdown link."""
    if "<" in text and _TAG.search(text):
        return True
    if "&" in text and any(name == "" or name in html5 for name in _ENTITY.findall(text)):
        return True
    return "[" in text and _LINK.search(text) is not None


def holds_repeats(text: str) -> bool:
    """Returns whether a character occurs eight times in a row, or a group of two to four characters six times."""
    return _REPEAT.search(text) is not None


class Blocklist:
    """Words and phrases that no caption may hold.

    A phrase is a sequence of words. In scripts that put no spaces between words (Han, kana, Thai, Lao, Khmer, Burmese,
    Tibetan) every letter counts as a word, so that phrases are found inside longer text; "cat" is not found in
    "concatenate". However long the list is, a text of n words costs n look-ups, and more only where a phrase may begin.

    Args:
        phrases: Phrases of at least one word, in any case and Unicode form.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self._phrases: set[tuple[str, ...]] = set()
        lengths: dict[str, set[int]] = {}
        for phrase in phrases:
            words = tuple(_words(normalise(phrase)))
            self._phrases.add(words)
            lengths.setdefault(words[0], set()).add(len(words))
        self._lengths = {first: tuple(sorted(found)) for first, found in lengths.items()}

    def matches(self, normalised: str) -> bool:
        """Returns whether a normalised text holds one of the phrases."""
        words = _words(normalised)
        lengths = self._lengths
        starts = [start for start, word in enumerate(words) if word in lengths]
        return any(
            tuple(words[start : start + length]) in self._phrases
            for start in starts
            for length in lengths[words[start]]
        )


def load_blocklist(uri: str) -> Blocklist:
    """Reads a blocklist: UTF-8, a word or phrase on each line; blank lines and lines starting with `#` are skipped.

    Raises:
        ConfigError: The file does not exist, is not UTF-8, has no entries, or has one without letters or digits.
        StorageError: The file cannot be read.
    """
    content = read_blocklist(uri)
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            "The blocklist is not UTF-8.",
            where=f"{uri}: line {line}",
            found=f"byte 0x{content[error.start]:02x}",
            remedy="Convert it first, for example with iconv -f latin1 -t utf-8.",
        ) from error
    entries = [(number, line) for number, line in enumerate(lines, start=1) if line and not line.startswith("#")]
    for number, entry in entries:
        if not _words(normalise(entry)):
            raise ConfigError(
                "An entry of the blocklist has no word.",
                where=f"{uri}: line {number}",
                expected="letters or digits",
                found=repr(entry),
                remedy="Remove the line, or start it with # to make it a comment.",
            )
    if not entries:
        raise ConfigError(
            "The blocklist is empty.",
            where=uri,
            expected="a word or phrase on each line",
            remedy="Leave out cleaning.blocklist to drop nothing.",
        )
    return Blocklist(entry for _, entry in entries)


def read_blocklist(uri: str) -> bytes:
    """Returns the content of a blocklist.

    Raises:
        ConfigError: The file does not exist.
        StorageError: The file cannot be read.
    """
    if not storage.exists(uri):
        raise ConfigError("The blocklist does not exist.", where=uri, remedy="Check cleaning.blocklist.")
    return storage.read_bytes(uri)


_UNSPACED = (  # letters of the scripts that put no spaces between words
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46"  # Thai
    "\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"  # Lao
    "\u0f00\u0f40-\u0f6c\u0f88-\u0f8c"  # Tibetan
    "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u106e-\u1070\u1075-\u1081\uaa60-\uaa76"  # Burmese
    "\u1780-\u17b3\u17d7\u17dc"  # Khmer
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana, marks of iteration
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_ASCII_WORD = re.compile(r"[a-z0-9_]+")


def _words(normalised: str) -> list[str]:
    """Splits a text into words; combining marks and joiners, which `\\w` does not match, belong to what they follow."""
    pattern = _ASCII_WORD if normalised.isascii() else _word_pattern()  # the same words for ASCII, ten times as fast
    return pattern.findall(normalised)


@lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern[str]:
    marks = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
    joined = "".join(map(chr, [*marks, 0x200C, 0x200D]))  # zero-width (non-)joiners occur inside words
    return re.compile(rf"[{_UNSPACED}][{joined}]*|(?:[^\W{_UNSPACED}]+[{joined}]*)+")
