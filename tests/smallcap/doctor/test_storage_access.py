import fcntl
from pathlib import Path
from typing import Any

import pytest

from smallcap import storage
from smallcap.doctor.report import Finding, attempt
from smallcap.doctor.storage_access import check_storage


def findings(uri: str) -> list[Finding]:
    return list(attempt("storage", lambda: check_storage(uri), "Look."))


def test_a_sound_place_is_left_as_it_was(anywhere: str) -> None:
    parent = anywhere.rpartition("/")[0]
    before = storage.list_folder(parent)
    (finding,) = findings(storage.join(anywhere, "deeper"))
    assert (finding.status, finding.subject) == ("ok", f"storage {anywhere}/deeper")
    assert storage.list_folder(parent) == before
    storage.write_bytes(storage.join(anywhere, "mine"), b"x")
    (finding,) = findings(anywhere)
    assert finding.status == "ok"
    assert storage.list_folder(anywhere) == [storage.join(anywhere, "mine")]


def test_a_place_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (finding,) = findings(str(tmp_path / "file" / "folder"))
    assert finding.status == "fail"
    assert finding.remedy


def test_a_bucket_that_may_not_be_written_to_is_a_failure(s3: str, fault_proxy: Any) -> None:
    fault_proxy.plan(rates={"error": 1.0}, methods=["PUT"], error_status=403, error_code="AccessDenied")
    (finding,) = findings(s3)
    assert (finding.status, finding.remedy) == ("fail", "Check the credentials.")
    assert "access denied" in finding.found


def test_a_store_without_conditional_writes_is_a_failure(s3: str, fault_proxy: Any) -> None:
    fault_proxy.plan(drop_conditions=True)
    (finding,) = findings(s3)
    assert finding.status == "fail"
    assert "it ignores that an object is new" in finding.found
    assert not storage.list_folder(s3)


def test_a_store_that_refuses_conditional_writes_is_a_failure(s3: str, fault_proxy: Any) -> None:
    fault_proxy.plan(schedule=[None, None], rates={"error": 1.0}, methods=["PUT"], error_status=400)
    (finding,) = findings(s3)
    assert finding.status == "fail"
    assert "a conditional write that must succeed is refused" in finding.found


@pytest.mark.parametrize(("locks", "found"), [(False, "cannot be locked"), (True, "two locks")])
def test_a_disk_without_locks_is_a_failure(
    locks: bool, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, operation: int) -> None:
        if not locks:
            raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (finding,) = findings(str(tmp_path))
    assert (finding.status, found in finding.found) == ("fail", True)


def test_other_stores_get_a_warning() -> None:
    (finding,) = findings("memory://doctor")
    assert (finding.status, "no conditional write" in finding.found) == ("warn", True)
