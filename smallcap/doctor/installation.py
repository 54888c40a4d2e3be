"""Checks Python and the packages: their versions against what smallcap asks for, and that they can be imported."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from smallcap.doctor.report import Finding, attempt, fail, ok, warn
from smallcap.machine.description import FAISS_PACKAGES, installed_versions

_NAMED = ("smallcap", "torch", "transformers", *FAISS_PACKAGES, "pyarrow", "ray")
# torch before faiss: where their CUDA libraries differ, the other order can end the process.
_IMPORTED = ("torch", "faiss", "transformers", "open_clip", "pyarrow.dataset", "obstore", "s3fs", "simplejpeg")


def check_installation() -> Iterator[Finding]:
    """Compares Python and the packages with what smallcap's metadata asks for."""
    try:
        asked = metadata("smallcap")["Requires-Python"] or ""
        requirements = requires("smallcap") or []
    except PackageNotFoundError:
        yield warn(
            "packages",
            "smallcap is not installed, so nothing says which versions it needs",
            "Install it: pip install -e . in its checkout, with constraints.txt.",
        )
        return
    yield check_python(asked, platform.python_version())
    yield from check_packages(requirements)


def check_python(asked: str, running: str) -> Finding:
    """Compares the running version of Python with a specifier such as `>=3.11`."""
    if SpecifierSet(asked).contains(running, prereleases=True):
        return ok("python", f"{running} (smallcap asks for {asked})")
    return fail("python", f"{running}, but smallcap asks for {asked}", "Make a virtual environment of such a Python.")


def check_packages(requirements: Sequence[str], installed: Callable[[str], str] = version) -> Iterator[Finding]:
    """Compares packages with requirements; extras are left out.

    Args:
        requirements: Lines such as `torch>=2.11; sys_platform == 'linux'`.
        installed: Returns a package's version, or raises `PackageNotFoundError`.
    """
    parsed = [Requirement(line) for line in requirements]
    wanted = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    problems = 0
    for requirement in wanted:
        asked = f"{requirement.name}{requirement.specifier}"
        try:
            found = installed(requirement.name)
        except PackageNotFoundError:
            others = installed_versions(FAISS_PACKAGES, installed) if requirement.name in FAISS_PACKAGES else {}
            if others:
                yield warn(
                    "packages",
                    f"{_listed(others)} in place of {asked}",
                    f"It searches on the CPU if it has no GPU support: pip install '{asked}' after removing it.",
                )
                continue
            found = ""
        if not found or not requirement.specifier.contains(found, prereleases=True):
            problems += 1
            yield fail(
                "packages",
                f"{requirement.name} {found or 'is missing'}, but smallcap asks for {asked}",
                f"pip install '{asked}', with constraints.txt for the versions that were tested.",
            )
    if not problems:
        yield ok("packages", f"{len(wanted)} as asked for: {_listed(installed_versions(_NAMED, installed))}")


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {found}" for name, found in versions.items())


def check_imports(modules: Sequence[str] = _IMPORTED) -> Iterator[Finding]:
    """Imports the packages with compiled code; a crash shows the name of the one that was being imported."""
    start = time.monotonic()
    failures = 0
    for name in modules:
        print(f"importing {name}", flush=True)

        def load(name: str = name) -> Iterator[Finding]:
            import_module(name)
            yield from ()

        for finding in attempt("imports", load, f"Install {name.partition('.')[0]} again, with constraints.txt."):
            failures += 1
            yield finding
    if not failures:
        yield ok("imports", f"{', '.join(modules)} in {time.monotonic() - start:.1f} s")


def describe_installation() -> dict[str, str]:
    """Returns what nodes of a cluster must agree on: Python, packages, and a digest of smallcap's source files."""
    return {
        "python": platform.python_version(),
        **installed_versions(_NAMED),
        "smallcap's source": source_digest(),
    }


def source_digest() -> str:
    """Returns the first digits of a sha256 over the Python files of this installation's three packages."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in ("smallcap", "index_builder", "jobs"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
