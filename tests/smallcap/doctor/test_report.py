from collections.abc import Iterator

from smallcap.doctor.report import Finding, attempt, failed_by, ok
from smallcap.errors import StorageError


def test_an_error_of_ours_is_one_line_and_brings_its_remedy() -> None:
    error = StorageError(
        "Cannot write this file.", where="s3://a/b", found="403\n  Forbidden", remedy="Ask for access."
    )
    expected = Finding("storage", "fail", "Cannot write this file: at s3://a/b; found 403 Forbidden", "Ask for access.")
    assert failed_by("storage", error, "Look.") == expected
    assert failed_by("storage", StorageError("Cannot."), "Look.").remedy == "Look."


def test_what_was_found_before_an_error_is_kept() -> None:
    def check() -> Iterator[Finding]:
        yield ok("model", "is there")
        raise OSError("x" * 1000)

    first, second = attempt("model", check, "Look.")
    assert first.found == "is there"
    assert second.status == "fail"
    assert len(second.found) < 320
