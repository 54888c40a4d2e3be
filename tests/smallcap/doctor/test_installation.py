from importlib.metadata import PackageNotFoundError

import pytest

from smallcap.doctor.installation import (
    check_imports,
    check_installation,
    check_packages,
    check_python,
    describe_installation,
)
from smallcap.doctor.report import Finding


def packages(requirements: list[str], **installed: str) -> list[Finding]:
    def version(name: str) -> str:
        try:
            return installed[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    return list(check_packages(requirements, version))


def test_this_installation_is_sound() -> None:
    findings = [*check_installation(), *check_imports(["torch", "faiss"])]
    assert [(finding.subject, finding.status) for finding in findings] == [
        ("python", "ok"),
        ("packages", "ok"),
        ("imports", "ok"),
    ]
    assert "torch " in findings[1].found


def test_an_older_python_is_a_failure() -> None:
    assert check_python(">=3.11", "3.11.0rc1").status == "fail"
    assert check_python(">=3.11", "3.13.1").status == "ok"
    finding = check_python(">=3.11", "3.10.14")
    assert (finding.status, finding.found) == ("fail", "3.10.14, but smallcap asks for >=3.11")


def test_missing_and_old_packages_are_failures_and_extras_are_not() -> None:
    asked = [
        "torch>=2.11",
        "ray[data]<2.61,>=2.60",
        "numpy",
        "pycocoevalcap>=1.2; extra == 'eval'",
        "x; sys_platform == 'y'",
    ]
    old, missing = packages(asked, torch="2.4.1", numpy="1.26")
    assert (old.status, old.found) == ("fail", "torch 2.4.1, but smallcap asks for torch>=2.11")
    assert "pip install 'torch>=2.11'" in old.remedy
    assert missing.found == "ray is missing, but smallcap asks for ray<2.61,>=2.60"
    (sound,) = packages(asked, torch="2.11.0+cu130", ray="2.60.3", numpy="2.0")
    assert (sound.status, sound.found) == ("ok", "3 as asked for: torch 2.11.0+cu130, ray 2.60.3")


def test_one_faiss_may_stand_for_another() -> None:
    other, sound = packages(["faiss-gpu>=1.15"], faiss_cpu="1.15.0")
    assert (other.status, sound.status) == ("warn", "ok")
    assert "faiss-cpu 1.15.0 in place of faiss-gpu>=1.15" in other.found


def test_a_package_that_cannot_be_imported_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    (finding,) = check_imports(["json", "no_such_module"])
    assert (finding.status, finding.found) == ("fail", "ModuleNotFoundError: No module named 'no_such_module'")
    assert capsys.readouterr().out.splitlines()[-1] == "importing no_such_module"  # what a crash would leave


def test_a_description_says_which_source_it_is() -> None:
    described = describe_installation()
    assert described.keys() >= {"python", "torch", "ray", "smallcap's source"}
    assert described == describe_installation()
