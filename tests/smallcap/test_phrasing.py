import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallcap.phrasing import describe_count, describe_duration, describe_gb, one_line, visible


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (44.6, "45 s"), (60, "1 min"), (750, "12 min 30 s"), (3600, "1 h"), (12000, "3 h 20 min"),
        (187200, "2 d 4 h"),
    ],
)  # fmt: skip
def test_durations_are_short(seconds: float, text: str) -> None:
    assert describe_duration(seconds) == text


def test_counts_agree_with_their_nouns() -> None:
    counts = [describe_count(1, "node"), describe_count(2_000_000, "node"), describe_count(0.5, "GPU")]
    assert counts == ["1 node", "2,000,000 nodes", "0.5 GPUs"]


def test_sizes_are_in_gb_of_a_billion_bytes() -> None:
    assert [describe_gb(size) for size in (0, 1_540_000_000, 2_000_000_000_000)] == ["0.0 GB", "1.5 GB", "2,000.0 GB"]


ATTACKS = [
    ("\x1b[31mred", "\\x1b[31mred"),
    ("\x1b]8;;http://host\x07link", "\\x1b]8;;http://host\\x07link"),
    ("\x1b]52;c;aGk=\x1b\\", "\\x1b]52;c;aGk=\\x1b\\"),
    ("\x9b2J\x9d0;title\x9c", "\\x9b2J\\x9d0;title\\x9c"),
    ("over\rwritten\x08\x7f\x00", "over\\rwritten\\x08\\x7f\\x00"),
    ("photo\u202egpj.exe", "photo\\u202egpj.exe"),
    ("\u2066a\u2069\u200e\u200f\u061c", "\\u2066a\\u2069\\u200e\\u200f\\u061c"),
    ("pass\u200bword\ufeff\u2060so\u00adft", "pass\\u200bword\\ufeff\\u2060so\\xadft"),
    ("ca\u200dt, do\u200cg\u200d", "ca\\u200dt, do\\u200cg\\u200d"),
    ("line\u2028and\u2029paragraph\x85", "line\\u2028and\\u2029paragraph\\x85"),
    ("\udcff\ud800", "\\udcff\\ud800"),
    ("\ue000\ufffe\u0378", "\\ue000\\ufffe\\u0378"),
    ("hidden\U000e0041\U000e0042", "hidden\\U000e0041\\U000e0042"),
    ("a\ufe0f\ufe01\ufe02", "a\ufe0f\\ufe01\\ufe02"),
    ("\u3164\u115f", "\\u3164\\u115f"),
]
ORDINARY = [
    "a dog on a beach, in 5 µm – naïve “quotes” … e\u0301",
    "مرحبا بالعالم",
    "می\u200cخواهم",
    "क\u094d\u200dष, क\u094d\u200d ष",
    "ශ\u0dca\u200dර\u0dd3 ලංකා",
    "日本\u3000語, 葛\U000e0100城",
    "สวัสดี, က\u1039, \U000323af",
    "👩\u200d🚀 👩🏽\u200d🌾 ❤\ufe0f\u200d🔥 🏳\ufe0f\u200d🌈 1\ufe0f\u20e3 \U0001fae8",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "back\\slash [red]markup[/] :dog:",
]


@pytest.mark.parametrize("place", range(len(ATTACKS)))
def test_what_would_not_be_seen_is_escaped(place: int) -> None:
    text, shown = ATTACKS[place]
    assert visible(text) == shown


@pytest.mark.parametrize("place", range(len(ORDINARY)))
def test_words_of_all_scripts_and_emoji_stay_as_they_are(place: int) -> None:
    assert visible(ORDINARY[place]) == ORDINARY[place]
    assert one_line(ORDINARY[place]) == ORDINARY[place]


def test_lines_stay_where_they_may() -> None:
    assert visible("a\n\tb") == "a\n\tb"
    assert visible("a\n\tb", kept="") == "a\\n\\tb"
    assert one_line("  a\n  b\r\nc\u2028d ") == "a b c d"
    assert one_line("x" * 50 + "y" * 50, 20) == "x" * 13 + " … " + "y" * 7


@given(st.text())
def test_any_text_becomes_safe_to_print(text: str) -> None:
    shown = visible(text, kept="")
    assert not set(shown) & {chr(code) for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F))}
    assert not any("\ud800" <= letter <= "\udfff" for letter in shown)
    assert visible(shown, kept="") == shown
    assert len(one_line(text).splitlines()) <= 1
