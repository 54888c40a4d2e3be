import pytest

from smallcap.phrasing import describe_count, describe_duration, describe_gb


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
