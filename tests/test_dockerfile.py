"""The image's Dockerfile is sound, and its commands do here, without Docker or a network, what they do there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.python_process import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TEXT = DOCKERFILE.read_text()
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.M)).splitlines()
    if line.strip()
]
# These need root, Debian's packages or the Python Package Index.
_OF_THE_IMAGE = (
    "apt-get ",
    "useradd ",
    "echo 'PATH=",
    "/opt/smallcap/bin/python -m pip install --no-cache-dir --disable-pip-version-check pip==",
)


def arguments(name: str) -> list[str]:
    return [argument for instruction, argument in INSTRUCTIONS if instruction == name]


def run_lines() -> list[str]:
    """The shell commands of the RUN instructions, in their order."""
    return [re.sub(r"^--mount=\S+\s+", "", argument) for argument in arguments("RUN")]


def test_every_stage_begins_with_one_pinned_python() -> None:
    (given,) = arguments("ARG")
    assert re.fullmatch(r"PYTHON=python:3\.11\.\d+-slim-bookworm", given)
    assert [argument.partition(" ")[0] for argument in arguments("FROM")] == ["${PYTHON}"] * 3


def test_the_image_runs_as_nobody_special() -> None:
    last = max(number for number, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM")
    names = [name for name, _ in INSTRUCTIONS[last:]]
    assert arguments("USER") == ["1000:1000"]
    assert names.index("USER") > max(number for number, name in enumerate(names[:-1]) if name in ("COPY", "ENV"))
    assert "ENTRYPOINT" not in names  # KubeRay gives the command


def test_what_is_installed_is_pinned() -> None:
    for line in run_lines():
        if "pip install" in line:
            assert "-c " in line or "==" in line or "--no-deps" in line, line


def test_its_shell_commands_are_well_formed() -> None:
    for line in run_lines():
        subprocess.run(["bash", "-n", "-c", line], check=True)


def sent_to_the_build() -> list[str]:
    """The patterns of what a build is given."""
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    return [line[1:] for line in ignored if line.startswith("!")]


def test_the_build_is_given_what_the_wheel_is_made_of() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*build["force-include"], *build["packages"], "pyproject.toml", "README.md", "LICENSE", "constraints.txt"]
    for path in needed:
        assert any(Path(path).match(pattern) for pattern in sent_to_the_build()), path


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a build is given."""
    folder = tmp_path / "src"
    for pattern in sent_to_the_build():
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, target)
    return folder


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with the packages of this environment, except smallcap: they stand for those of the index."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for place in filter(lambda place: place.endswith("site-packages"), sys.path):
        for path in Path(place).iterdir():
            if "smallcap" not in path.name and path.suffix != ".pth" and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.slow
def test_its_commands_build_an_environment_with_smallcap(tmp_path: Path, sources: Path, packages: Path) -> None:
    pytest.importorskip("hatchling", reason="`make setup` installs the tools that build")
    (tmp_path / "wheels").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_", "AWS_"))}
    path = f"{tmp_path}/opt/smallcap/bin:{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"PIP_NO_INDEX": "1", "PATH": path}
    ran = [line for line in run_lines() if not line.startswith(_OF_THE_IMAGE)]
    assert len(ran) == len(run_lines()) - len(_OF_THE_IMAGE)
    for line in ran:
        here = re.sub(r"(?<![\w.])/(opt/smallcap|build|wheels)\b", lambda found: str(tmp_path / found[1]), line)
        # `ray` is a script of the packages that are installed elsewhere
        here = here.replace("&& ray --version", "&& python -m ray.scripts.scripts --version")
        command = ["bash", "-ec", here]
        done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{here}\n{done.stdout}{done.stderr}"
        if made := re.search(r"-m venv (\S+)$", here):
            own = Path(sysconfig.get_path("purelib", vars={"base": made[1], "platbase": made[1]}))
            for old in own.iterdir():  # the newer pip and setuptools of this environment take their places
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            (own / "needed.pth").write_text(str(packages))
    assert re.search(r"version 2\.60", done.stdout)
    needed = (tmp_path / "wheels" / "requirements.txt").read_text()
    assert {"ray[default]", "ray[train]", "pillow-heif"} <= set(re.findall(r"^[\w-]+(?:\[\w+\])?", needed, re.M))
    command = ["python", "-c", "import smallcap; print(smallcap.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(f"{tmp_path}/opt/smallcap/lib/")
