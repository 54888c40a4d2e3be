"""Words for people: counts that agree with their nouns, durations, sizes, and text from elsewhere that is safe to show.

A terminal obeys what it is sent: escape sequences move its cursor, set its title or write to the clipboard, and
controls of direction and width make a text look like another. A caption, a file's name or a service's answer may hold
them, so they are shown escaped. Secrets are not shown at all (`smallcap.redaction`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from unicodedata import category

from smallcap.redaction import hide_secrets

_FLAG = re.compile("(\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{2,6}\U000e007f)")  # such as Scotland's
_JOINERS = "\u200c\u200d"  # ordinary within words of many scripts, and within emoji
# Format characters with ink.
_SIGNS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
_NO_INK = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"  # letters and marks without any
_SELECTORS = re.compile(
    "[\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)  # each says how the letter before it looks
_LAST_LATIN = "\u02af"
_NEWER_THAN_PYTHON = re.compile("[\U0001f000-\U0001faff\U00020000-\U0003fffd]")  # emoji and Chinese characters
_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x85\u2028\u2029]\s*")


def visible(text: str, kept: str = "\n\t") -> str:
    """Returns text with everything escaped that would not be seen, such as `\\x1b` and `\\u202e`, and without secrets.

    Words of all scripts and emoji stay as they are.

    Args:
        text: Any text, also with surrogates.
        kept: Control characters that are left as they are; nothing for a text that must stay in one line.
    """
    text = hide_secrets(text)
    if text.isascii() and text.isprintable():
        return text
    pieces = _FLAG.split(text)  # flags stand at odd places
    return "".join(piece if place % 2 else _escaped(piece, kept) for place, piece in enumerate(pieces))


def _escaped(text: str, kept: str) -> str:
    return "".join(
        letter if letter in kept or _is_seen(text, place) else letter.encode("unicode_escape").decode()
        for place, letter in enumerate(text)
    )


def _is_seen(text: str, place: int) -> bool:
    letter, before = text[place], text[place - 1 : place] if place else ""
    if letter in _JOINERS:
        return _is_within_word(before, text[place + 1 : place + 2])
    if _SELECTORS.match(letter):  # several in a row hide bytes
        return before.isprintable() and not before.isspace() and before != "" and not _SELECTORS.match(before)
    if letter.isprintable():
        return letter not in _NO_INK
    kind = category(letter)
    return kind == "Zs" or letter in _SIGNS or (kind == "Cn" and _is_newer_than_python(letter))


def _is_within_word(before: str, after: str) -> bool:
    """Says whether a joiner stands where one is written: between letters, or after a mark that ends a word."""
    if not _is_joinable(before):
        return False
    return _is_joinable(after) or category(before).startswith("M")


def _is_joinable(letter: str) -> bool:
    """Says whether a letter, mark or symbol is of a script that has joiners, which Latin has not."""
    return letter > _LAST_LATIN and (category(letter)[0] in "LMS" or _is_newer_than_python(letter))


def _is_newer_than_python(letter: str) -> bool:
    """Says whether a character may have been added to Unicode since this Python's tables were made."""
    return bool(_NEWER_THAN_PYTHON.match(letter)) and ord(letter) & 0xFFFE != 0xFFFE


def one_line(text: str, longest: int = 0) -> str:
    """Returns text as one visible line, shortened in the middle if it has more than `longest` characters (0: any)."""
    line = visible(_LINE_BREAKS.sub(" ", text.strip()), kept="\t")
    if not longest or len(line) <= longest:
        return line
    begins = longest * 2 // 3
    return f"{line[:begins]} … {line[len(line) - (longest - begins) :]}"


def describe_count(count: float, noun: str) -> str:
    """Returns a number with its noun: `1 node`, `2,000 nodes`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def describe_counts(counts: Mapping[str, int]) -> str:
    """Returns several counts in their order: `2,000 timeout, 1 too_large`; empty for none."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def describe_duration(seconds: float) -> str:
    """Returns a duration in its two largest units: `45 s`, `12 min 30 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    units = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count) or "0 s"


def describe_gb(size: int) -> str:
    """Returns a number of bytes in GB (10^9 bytes): `1.5 GB`."""
    return f"{size / 1e9:,.1f} GB"
