"""The recipes for schedulers are Python, shell and commands that their own parsers take."""

import ast
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from smallcap.config import CaptionConfig
from tests.command_lines import parse_command
from tests.python_process import ROOT

TEXT = (ROOT / "docs" / "schedulers.md").read_text()
IN_PYTHON = ("Airflow", "Dagster", "Prefect")
# What each scheduler has, in the releases of 2026; the other imports are of the standard library.
THEIRS = {
    "airflow.providers.standard.operators.bash": {"BashOperator"},
    "airflow.sdk": {"DAG"},
    "dagster": {"AssetExecutionContext", "MaterializeResult", "RetryPolicy", "asset"},
    "prefect": {"flow", "task"},
    "prefect.runtime": {"task_run"},
}


def block(title: str) -> str:
    """Returns the longest block of code below a title."""
    section = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^(?: {4}.*\n|\n)+", section, re.M)
    return textwrap.dedent(max(blocks, key=len)).strip("\n") + "\n"


def texts(tree: ast.AST) -> Iterator[str]:
    yield from (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize("title", IN_PYTHON)
def test_a_recipe_compiles_and_imports_what_its_scheduler_has(title: str) -> None:
    tree = ast.parse(block(title))
    compile(tree, title, "exec")
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= {"json", "os", "shlex", "subprocess"}
    taken = {
        node.module: {name.name for name in node.names} for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    for module, names in taken.items():
        assert module == "datetime" or names <= THEIRS[module or ""], module
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for names in [imported, *taken.values()]:
        assert names <= used


@pytest.mark.parametrize("title", IN_PYTHON)
def test_the_commands_of_a_recipe_are_smallcaps(title: str) -> None:
    lines = [text for text in texts(ast.parse(block(title))) if text.startswith("smallcap ")]
    parsed = dict(parse_command(line) for line in lines)
    (config, call) = parsed["caption"]
    assert isinstance(config, CaptionConfig)
    assert call.relist  # type: ignore[attr-defined]
    for other in set(parsed) - {"caption"}:
        assert config.out in next(line for line in lines if line.startswith(f"smallcap {other} "))


def submissions() -> Iterator[list[str]]:
    """The options of each `ray job submit`, as words."""
    for title in IN_PYTHON:
        for node in ast.walk(ast.parse(block(title))):
            if isinstance(node, ast.List):
                words = [item.value if isinstance(item, ast.Constant) else "x" for item in node.elts]
                if words[:3] == ["ray", "job", "submit"]:
                    yield [str(word) for word in words[3:]]
            elif isinstance(node, ast.Constant) and str(node.value).startswith("ray job submit "):
                yield shlex.split(re.sub(r"\{\{.*?\}\}", "x", node.value))[3:]


def test_ray_takes_the_options_of_each_submission() -> None:
    cli = pytest.importorskip("ray.dashboard.modules.job.cli")
    found = list(submissions())
    assert len(found) == len(IN_PYTHON)
    for words in found:
        assert words[-1] == "--"
        with cli.submit.make_context("submit", [*words, "true"]) as context:
            assert context.params["submission_id"]
            assert context.params["entrypoint"] == ("true",)


def slurm_command() -> list[str]:
    (line,) = re.findall(r"^srun .*$", re.sub(r"\\\n\s*", "", block("Slurm")), re.M)
    return shlex.split(line)


def test_the_slurm_script_is_well_formed(tmp_path: Path) -> None:
    (tmp_path / "caption.sh").write_text(block("Slurm"))
    subprocess.run(["bash", "-n", tmp_path / "caption.sh"], check=True)
    lines = block("Slurm").splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(directives)] == directives  # Slurm reads none after the first command
    assert "#SBATCH --exclusive" in {" ".join(line.split()[:2]) for line in directives}


def test_ray_takes_the_options_of_the_symmetric_run_and_smallcap_those_behind_it() -> None:
    symmetric = pytest.importorskip("ray.scripts.symmetric_run")
    scripts = pytest.importorskip("ray.scripts.scripts")
    words = slurm_command()
    between = words[words.index("symmetric-run") + 1 : words.index("--")]
    start = symmetric.curate_and_validate_ray_start_args([re.sub(r"^\$.*", "4", word) for word in between])
    assert start == ["--num-cpus", "4"]
    with scripts.start.make_context("start", ["--head", *start]) as context:
        assert context.params["num_cpus"] == 4
    address = between[between.index("--address") + 1]
    behind = [word.replace(address, "10.0.0.5:6379") for word in words[words.index("--") + 1 :]]
    name, (config, call) = parse_command(shlex.join(behind))
    assert (name, config.compute.device) == ("caption", "cuda")  # type: ignore[attr-defined]
    assert call.address == "10.0.0.5:6379"  # type: ignore[attr-defined]


def test_the_waiting_time_that_it_sets_is_read_by_ray() -> None:
    symmetric = pytest.importorskip("ray.scripts.symmetric_run")
    (name,) = re.findall(r"(RAY_SYMMETRIC_RUN_\w+)=", block("Slurm"))
    assert name in Path(symmetric.__file__).read_text()
