"""docs/architecture.md says what the code is: the layers that import-linter holds, and files that exist."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_layers_are_those_that_import_linter_holds() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    held = {contract["containers"][0]: contract["layers"] for contract in contracts if contract.get("containers")}
    block = ARCHITECTURE.partition("## Packages")[2].partition("\n## ")[0]
    said: dict[str, list[str]] = {}
    package = ""
    for line in re.findall(r"^ {4}(.*)$", block, re.M):
        name, layer = line[:16].strip(), line[16:].strip()
        package = name or package
        said.setdefault(package, []).append(layer)
    assert said == held


def test_the_files_that_it_names_exist() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.py")}
    for named in re.findall(r"`([a-z0-9_/]+\.py)", ARCHITECTURE):
        assert any(file == named or file.endswith(f"/{named}") for file in files), named
