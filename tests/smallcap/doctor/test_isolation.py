"""Checks that hang, crash and raise; functions of the standard library stand in for them."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from smallcap.doctor.isolation import Check, Isolation
from smallcap.doctor.report import Finding, ok

SOUND = Check("machine", "smallcap.doctor.machine:check_machine", (), 100, "")
MACHINE = ["threads", "memory", "shared memory", "open files", "temporary files"]


def check_of(function: str, *arguments: Any) -> Check:
    return Check("subject", function, arguments, 3, "Mend it.")


def number_process() -> Iterator[Finding]:
    """A check that finds the number of its process."""
    yield ok("number", str(os.getpid()))


NUMBER = Check("number", f"{__name__}:number_process", (), 100, "")


@pytest.mark.parametrize(
    ("function", "arguments", "found"),
    [
        ("builtins:int", ("x",), "ValueError: invalid literal for int() with base 10: 'x'"),
        ("missing_module:check", (), "ModuleNotFoundError: No module named 'missing_module'"),
        ("os:abort", (), "its process ended by signal SIGABRT"),
        ("os:_exit", (3,), "its process ended by exit code 3"),
        ("os:_exit", (0,), "its process ended by exit code 0"),
        ("sys:exit", ("out of luck",), "its process ended by exit code 1; it had printed: out of luck"),
        ("time:sleep", (1000,), "no answer within 3 s"),
    ],
)
def test_whatever_a_check_does_ends_as_a_failure_with_a_remedy(
    function: str, arguments: tuple[Any, ...], found: str
) -> None:
    waited: list[float] = []
    with Isolation(lambda _, seconds: waited.append(seconds), patience_s=1) as isolation:
        (finding,) = isolation.run(check_of(function, *arguments))
        expected = ("subject", "fail", found, "Mend it.")
        assert (finding.subject, finding.status, finding.found, finding.remedy) == expected
        if function == "time:sleep":
            assert [round(seconds) for seconds in waited] == [1, 2]
        assert [one.subject for one in isolation.run(SOUND)] == MACHINE  # in another process


def test_a_process_runs_checks_until_one_fails_in_it() -> None:
    with Isolation(lambda *_: None) as isolation:

        def number(check: Check = NUMBER) -> str:
            (finding,) = isolation.run(check)
            return finding.found

        first = number()
        assert number() == first != number(replace(NUMBER, is_alone=True))
        assert number() == first
        assert [finding.status for finding in isolation.run(check_of("builtins:int", "x"))] == ["fail"]
        assert number() != first
    assert not multiprocessing.active_children()


def print_something() -> Iterator[Finding]:
    """A check that finds nothing, and prints."""
    print("of an earlier check", flush=True)
    yield from ()


def test_only_what_a_check_has_printed_itself_is_shown() -> None:
    with Isolation(lambda *_: None) as isolation:
        assert not list(isolation.run(check_of(f"{__name__}:print_something")))
        (finding,) = isolation.run(check_of("os:_exit", 1))
    assert finding.found == "its process ended by exit code 1"


def test_a_report_that_nobody_reads_to_its_end_leaves_no_process() -> None:
    with Isolation(lambda *_: None) as isolation:
        findings = isolation.run(SOUND)
        next(findings)
        findings.close()
        assert not multiprocessing.active_children()
