"""The wheel, installed into an environment of its own: it is whole, and works outside the checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.python_process import ROOT

pytestmark = pytest.mark.slow
pytest.importorskip("build", reason="`make setup` installs the tools that build")
pytest.importorskip("hatchling", reason="`make setup` installs the tools that build")

# Where its package is, what is missing of its data, and where the packages of the same names are.
_LOOK = """
import importlib.metadata, index_builder, jobs, smallcap
from smallcap.model.files import demo_folder, tokenizer_folder
package = demo_folder().parent
data = [
    *(package / name for name in ("py.typed", "_demo/model/smallcap/config.json", "_demo/model/clip", "_demo/images")),
    *(package / f"_demo/{name}" for name in ("captions.csv", "captions-held-out.csv", "references-held-out.json")),
    *(tokenizer_folder("gpt2") / name for name in ("vocab.json", "merges.txt")),
    package.parent / "jobs" / "captioning" / "grafana.json",
    *(package / "report" / "template" / name for name in ("page.html.j2", "page.js", "style.css")),
]
print(importlib.metadata.version("smallcap") == smallcap.__version__, [str(file) for file in data if not file.exists()])
print(*(module.__path__[0] for module in (smallcap, jobs, index_builder)))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel in the folder SMALLCAP_DIST, or built as `make build` builds them."""
    if given := os.environ.get("SMALLCAP_DIST"):
        folder = ROOT / given
    else:
        folder = tmp_path_factory.mktemp("dist")
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
        subprocess.run(command, check=True, capture_output=True, text=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def run(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that runs a program of the environment with the wheel, and returns what it prints."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        built[1],
    ]
    subprocess.run(install, check=True)
    # What the wheel needs is already here. Only afterwards, so that pip sees an empty environment.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "needed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_", "AWS_"))}
    environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}

    def run(cwd: Path, program: str, *arguments: str) -> str:
        command = [folder / "bin" / program, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_three_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(about).decode()
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"smallcap", "jobs", "index_builder"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {line.split(": ")[1] for line in text.splitlines() if line.startswith("Provides-Extra")} == set(extras)
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert inside >= {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "constraints.txt",
        "docs/formats.md",
        "tests/conftest.py",
    }
    assert not any(name.startswith((".venv/", "out/", "dist/", ".git/")) for name in inside)


def test_it_is_whole_and_found_outside_the_checkout(run: Callable[..., str], tmp_path: Path) -> None:
    whole, places = run(tmp_path, "python", "-c", _LOOK).splitlines()
    assert whole == "True []"
    assert all("site-packages" in place and str(ROOT) not in place for place in places.split())
    assert run(tmp_path, "smallcap", "--version") == run(tmp_path, "python", "-m", "smallcap", "--version")
    assert "datastore" in run(tmp_path, "smallcap", "demo", "--help")


def test_a_folder_with_packages_of_the_same_names_does_not_disturb_it(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("jobs/__init__.py", "index_builder.py"):
        (tmp_path / name).write_text("raise SystemExit('another package')")
    for program in (["smallcap"], ["python", "-m", "smallcap"]):
        assert "Caption images." in run(tmp_path, *program, "caption", "--help")


@pytest.mark.own_ray
def test_the_demo_runs_from_it_beside_packages_of_the_same_names(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("jobs/__init__.py", "index_builder.py"):
        (tmp_path / name).write_text("raise SystemExit('another package')")
    printed = run(tmp_path, "smallcap", "demo", "--out", "out")
    assert "Parquet:" in printed
    assert len(list((tmp_path / "out" / "captions").glob("part-*.parquet"))) == 1
