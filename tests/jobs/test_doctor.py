"""The report of `smallcap doctor`, its JSON and its exit code, on sound and on broken set-ups."""

import json
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.doctor import examine, list_checks
from jobs.terminal.call_options import DoctorOptions
from smallcap.doctor.isolation import Check, Isolation
from smallcap.doctor.report import Finding, fail, ok, warn

runner = CliRunner()


def run_doctor(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and the findings as JSON has them."""
    done = runner.invoke(app, ["doctor", "--json", *arguments])
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Finding]]:
    """What each check finds, by its subject; the checks themselves do not run."""
    findings: dict[str, list[Finding]] = {}

    def answer(self: Isolation, check: Check) -> Iterator[Finding]:
        yield from findings.get(check.subject, [ok(check.subject, "is well")])

    monkeypatch.setattr(Isolation, "run", answer)
    return findings


def test_every_check_names_a_function() -> None:
    options = DoctorOptions(index="i", storage=("a", "b"), address="auto")
    without_index = DoctorOptions(retrieval_encoder="hf:e", quick=True)
    for check in (*list_checks(options), *list_checks(DoctorOptions()), *list_checks(without_index)):
        assert callable(resolve_name(check.run))
        assert check.remedy.endswith(".")
    assert [check.subject for check in list_checks(options)] == [
        *("packages", "machine", "imports", "devices", "storage a", "storage b", "model", "index", "cluster auto"),
        *("search", "captions", "speed"),
    ]
    assert [check.subject for check in list_checks(DoctorOptions(quick=True))] == [
        *("packages", "machine", "imports", "devices", "model"),
    ]
    assert list_checks(without_index)[-1].subject == "retrieval encoder"


def test_a_remedy_is_that_of_the_place_which_was_given() -> None:
    """A folder needs no credentials, and a bucket no disk."""
    for uri, words in (
        ("out/run", "a folder that can be made"),
        ("s3://bucket/run", "AWS_ENDPOINT_URL"),
        ("gs://bucket/run", "the credentials and the network"),
    ):
        (remedy,) = [c.remedy for c in list_checks(DoctorOptions(storage=(uri,))) if c.subject == f"storage {uri}"]
        assert words in remedy
    for uri, words in (("out/index", "build-index"), ("s3://bucket/index", "AWS_ENDPOINT_URL")):
        (remedy,) = [check.remedy for check in list_checks(DoctorOptions(index=uri)) if check.subject == "index"]
        assert words in remedy


def test_what_needs_a_failed_check_is_left_out(found: dict[str, list[Finding]]) -> None:
    found["imports"] = [fail("imports", "faiss crashes", "Install it.")]
    findings = {finding.subject: finding for finding in examine(list_checks(DoctorOptions(storage=("s",))))}
    left_out = [subject for subject, finding in findings.items() if finding.status == "warn"]
    assert left_out == ["devices", "model", "search", "captions", "speed"]
    assert findings["search"].found == "not looked at, because of imports"  # not of devices, which nobody looked at
    assert findings["storage s"].status == "ok"


def test_what_is_left_out_names_the_line_that_failed(found: dict[str, list[Finding]]) -> None:
    """`devices` and `machine` are not lines of the report."""
    found["devices"] = [fail("gpu driver", "is old", "Update it."), fail("cuda", "two of them", "Remove one.")]
    findings = {finding.subject: finding for finding in examine(list_checks(DoctorOptions()))}
    assert findings["speed"] == warn("speed", "not looked at, because of gpu driver", "Mend gpu driver first.")
    assert findings["model"].status == "ok"
    found["devices"], found["machine"] = [], [fail("temporary files", "nowhere", "Name a folder.")]
    findings = {finding.subject: finding for finding in examine(list_checks(DoctorOptions()))}
    assert findings["captions"].found == "not looked at, because of temporary files"


def test_the_report_is_text_and_its_exit_code_says_whether_anything_fails(found: dict[str, list[Finding]]) -> None:
    found["machine"] = [warn("open files", "1,024 at once", "ulimit -n 8192.")]
    done = runner.invoke(app, ["doctor", "--quick"])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "4 ok, 1 warning, 0 failures")
    assert "warn  open files        1,024 at once\n      → ulimit -n 8192.\n" in done.stdout
    found["model"] = [fail("model", "is missing", "Give another.")]
    assert runner.invoke(app, ["doctor", "--quick"]).exit_code == 1
    code, findings = run_doctor("--quick")
    assert code == 1
    assert findings[-1] == {"subject": "model", "status": "fail", "found": "is missing", "remedy": "Give another."}


@pytest.mark.slow
def test_broken_set_ups_end_in_failures_with_remedies(tmp_path: Path) -> None:
    """Each check in its process, as users meet it: no store, no index, no model and no cluster are there."""
    (tmp_path / "file").write_text("no folder")
    places = ("--storage", f"{tmp_path}/file/folder", "--index", f"{tmp_path}/none", "--model", f"{tmp_path}/none")
    code, findings = run_doctor("--quick", *places, "--address", "127.0.0.1:1")
    failed = {finding["subject"]: finding for finding in findings if finding["status"] == "fail"}
    assert code == 1
    assert failed.keys() >= {f"storage {tmp_path}/file/folder", "index", "model", "cluster 127.0.0.1:1"}
    assert all(finding["remedy"] for finding in failed.values())
    assert not [subject for subject, finding in failed.items() if "AWS" in finding["remedy"]]  # all is on this disk
    assert "nothing listens at that port" in failed["cluster 127.0.0.1:1"]["found"]
    assert {"python", "packages", "memory", "dtype"} <= {f["subject"] for f in findings if f["status"] == "ok"}
