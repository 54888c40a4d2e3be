"""What pyproject.toml brings fits together, and docs/installation.md says what the code does."""

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from smallcap.index import gpu_search
from tests.python_process import ROOT, run_python

INSTALLATION = (ROOT / "docs" / "installation.md").read_text()

_IMPORT_EVERYTHING = """
import importlib, pkgutil, {first}
import index_builder, jobs, smallcap
for package in (index_builder, jobs, smallcap):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(*sorted({{line.split()[-1] for line in open("/proc/self/maps") if "/nvidia/" in line}}), sep="\\n")
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("first", ["faiss", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_process_has_one_cuda_whatever_it_imports_first(first: str) -> None:
    files = run_python(_IMPORT_EVERYTHING.format(first=first)).split()
    copies = Counter(Path(file).name.partition(".so")[0] for file in files)
    assert ("libcudart" in copies) == (torch.version.cuda is not None)
    assert {name: count for name, count in copies.items() if count > 1} == {}, files


def test_the_largest_exact_searches_are_those_that_the_code_allows() -> None:
    said = re.findall(r"^\| (\d+) GB \| (\d+)M \| (\d+)M \|$", INSTALLATION, re.M)
    assert len(said) == 5
    for card, *millions in said:
        room = gpu_search.MEMORY_SHARE * (int(card) - 3) * 1e9 - 4 * gpu_search._SCORES_AT_ONCE
        assert [int(number) for number in millions] == [int(room / (2 * dim) / 1e6) for dim in (512, 1024)]


def test_every_extra_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (table,) = re.findall(r"^\| extra, (?:.+\n)+", INSTALLATION, re.M)
    assert set(re.findall(r"^\| `(\w+)` \| ", table, re.M)) == set(extras)


def test_the_workflow_runs_what_a_change_must_pass_and_builds_the_wheel() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["checks"]["steps"] if "run" in step]
    assert commands == [".ci/run", "make build"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    assert {"build", "release"} <= set(targets)
