"""Checks that hang, crash and raise; functions of the standard library stand in for them."""

from typing import Any

import pytest

from smallcap.doctor.isolation import Check, run_check


@pytest.mark.parametrize(
    ("function", "arguments", "found"),
    [
        ("builtins:int", ("x",), "ValueError: invalid literal for int() with base 10: 'x'"),
        ("missing_module:check", (), "ModuleNotFoundError: No module named 'missing_module'"),
        ("os:abort", (), "its process ended by signal SIGABRT"),
        ("os:_exit", (3,), "its process ended by exit code 3"),
        ("sys:exit", ("out of luck",), "its process ended by exit code 1; it had printed: out of luck"),
        ("time:sleep", (1000,), "no answer within 3 s"),
    ],
)
def test_whatever_a_check_does_ends_as_a_failure_with_a_remedy(
    function: str, arguments: tuple[Any, ...], found: str
) -> None:
    check = Check("subject", function, arguments, 3, "Mend it.")
    waited: list[float] = []
    (finding,) = run_check(check, lambda _, seconds: waited.append(seconds), patience_s=1)
    assert (finding.subject, finding.status, finding.found, finding.remedy) == ("subject", "fail", found, "Mend it.")
    if function == "time:sleep":
        assert [round(seconds) for seconds in waited] == [1, 2]


def test_findings_come_from_the_checks_process() -> None:
    check = Check("machine", "smallcap.doctor.machine:check_machine", (), 100, "")
    findings = list(run_check(check, lambda *_: None))
    assert [finding.subject for finding in findings] == ["threads", "memory", "shared memory", "open files"]
