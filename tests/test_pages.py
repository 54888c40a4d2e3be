"""The pages for people who run smallcap say what the code does: commands, columns, codes, costs, measured figures."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import screen
from jobs.cli import COMMANDS
from jobs.cluster.faults import FaultKind
from jobs.cluster.stopping import SIGNALS, Stopped
from jobs.terminal import command_line
from jobs.terminal.command_line import Command
from smallcap import errors
from smallcap.errors import ErrorCode, SmallCapError
from smallcap.output.schema import CAPTION_COLUMNS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
# The log has old names, benchmarks are programs of their own, and the page of options is generated.
PAGES = [README, *sorted(page for page in DOCS.glob("*.md") if page.stem not in ("log", "benchmarks", "options"))]


def section(page: str, title: str) -> str:
    """Returns what stands below a title, up to the next title of its rank or above."""
    text = (DOCS / page).read_text()
    rank = re.search(rf"^(#+) {re.escape(title)}$", text, re.M)
    assert rank, f"{page} has no section {title}"
    return re.split(rf"^#{{1,{len(rank[1])}}} ", text[rank.end() :], maxsplit=1, flags=re.M)[0]


def flags(command: Command) -> set[str]:
    """Returns all flags of a command, also those that turn a switch off."""
    switches = {f"--no-{option.names[-1].removeprefix('--')}" for option in command.options() if option.is_switch}
    return switches | {name for option in command.options() for name in option.names}


def table(text: str) -> list[list[str]]:
    """Returns the cells of all rows of tables, without their titles."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", text, re.M)]
    return [row for row, before in zip(rows[2:], rows, strict=False) if not set(row[0]) <= set("-:") and before]


def commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each command of smallcap in blocks of code, continued lines joined."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.startswith("    smallcap "):
            yield shlex.split(line)[1:]
        elif line.startswith("$ smallcap ") and "--help" not in line:  # of a recording
            yield shlex.split(re.split("[;|]", line)[0])[2:]  # without what the shell does afterwards


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_flags_and_keys_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for words in commands(text):
        fitting = [command for command in COMMANDS if words[: len(command.name.split())] == command.name.split()]
        assert fitting, words
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= flags(fitting[0]), words
    assert set(re.findall(r"`(--[a-z-]+[a-z])", text)) <= {flag for command in COMMANDS for flag in flags(command)}
    keys = {option.key for command in COMMANDS for option in command.options()} | {"a.b"}
    assert set(re.findall(r"--set ([a-z_.]+)=", text)) <= keys


def test_what_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text())
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_columns_are_those_of_the_schema_and_of_its_readers(tmp_path: Path) -> None:
    said = {name.strip("`"): cells for name, *cells in table((DOCS / "columns.md").read_text())}
    assert list(said) == CAPTION_COLUMNS.names
    file = tmp_path / "part.parquet"
    values = {"image_id": "a.jpg", "status": "error"}
    pq.write_table(pa.Table.from_pylist([values], CAPTION_COLUMNS), file)
    in_pandas = pd.read_parquet(file).dtypes.astype(str)
    in_duckdb = {name: kind for name, kind, *_ in duckdb.sql(f"DESCRIBE SELECT * FROM '{file}'").fetchall()}
    for field in CAPTION_COLUMNS:
        arrow, pandas, in_sql, null, _ = said[field.name]
        assert arrow.strip("`") == re.sub(r"(item|element): ", "", str(field.type))
        assert (null == "never") == (not field.nullable)
        assert in_sql.strip("`") == in_duckdb[field.name]
        if field.nullable or field.name in values:
            assert (field.name, pandas.strip("`")) == (field.name, in_pandas[field.name])


def test_duckdb_answers_the_questions_of_the_pages(tmp_path: Path) -> None:
    neighbours = [
        {"caption_id": 7, "text": "a dog", "score": 0.3, "sources": ["shop/a.csv"]},
        {"caption_id": 9, "text": "A cat", "score": 0.2, "sources": ["news/b.csv", "shop/a.csv"]},
    ]
    rows = [
        {"image_id": "a.jpg", "status": "ok", "caption": "a cat", "clip_score": 0.3, "neighbours": neighbours},
        {"image_id": "b.jpg", "status": "error", "error_code": "empty", "error_message": "The file is empty."},
    ]
    pq.write_table(pa.Table.from_pylist(rows, CAPTION_COLUMNS), tmp_path / "part-000-000000.parquet")
    written = "\n".join((DOCS / f"{name}.md").read_text() for name in ("columns", "troubleshooting", "quickstart"))
    questions = re.findall(r"SELECT [^;`\"]+", written.replace("out/captions", "OUT"))
    answers = [duckdb.sql(question.replace("OUT", str(tmp_path))).fetchall() for question in questions]
    assert [("ok", None, 1), ("error", "empty", 1)] == sorted(answers[0], reverse=True)
    assert answers[1:] == [
        [("a.jpg", "a cat", pytest.approx(0.3))],
        [("a.jpg", "a cat", "a dog"), ("a.jpg", "a cat", "A cat")],
        [("a.jpg", "a cat", pytest.approx(0.3))],
        [],
        [(1,)],
        [("news", 1), ("shop", 1)],
        [("b.jpg", "empty", "The file is empty.")],
        [("a.jpg", "a cat", pytest.approx(0.3)), ("b.jpg", None, None)],
    ]


def test_the_formats_have_the_columns_of_the_schema() -> None:
    said: dict[str, str] = {}
    for names, kind, *_ in table(section("formats.md", "Parts (schema version 1)").partition("File metadata")[0]):
        said |= dict.fromkeys(re.findall(r"`(\w+)`", names), kind)
    types = {pa.float32(): "float32", pa.string(): "string", pa.list_(pa.string()): "list&lt;string&gt;"}
    for field in CAPTION_COLUMNS:
        if not pa.types.is_list(field.type):
            kind = types.get(field.type, str(field.type))
            assert said.pop(field.name) == (kind if field.nullable else f"{kind}, not null")
        else:
            inner = ", ".join(f"{one.name} {types.get(one.type, one.type)}" for one in field.type.value_type)
            assert said.pop(field.name) == f"list&lt;struct&lt;{inner}&gt;&gt;"
    assert said == {}


def test_troubleshooting_has_every_code_that_the_code_writes() -> None:
    of_images, of_actors = (
        re.findall(r"^### `(\w+)`$", section("troubleshooting.md", title), re.M)
        for title in ("Codes of images", "Faults of actors")
    )
    assert of_images == [code.value for code in ErrorCode]
    assert of_actors == list(get_args(FaultKind))
    in_formats = re.findall(r"^\| `(\w+)` \|", (DOCS / "formats.md").read_text().partition("| error code |")[2], re.M)
    assert in_formats[: len(ErrorCode)] == of_images


def test_troubleshooting_has_every_class_of_error() -> None:
    classes = {name for name in errors.__all__ if name not in ("ErrorCode", SmallCapError.__name__)}
    assert {row[0].strip("`") for row in table(section("troubleshooting.md", "What stops a run"))} == classes


def test_the_options_page_has_every_exit_code() -> None:
    modules = (command_line, screen)
    codes = {value for module in modules for name, value in vars(module).items() if name.startswith("EXIT_")}
    codes |= {Stopped("", number).exit_status for number in SIGNALS}
    said = [int(code) for row in table(section("options.md", "Exit codes")) for code in row[0].split(", ")]
    assert sorted(said) == sorted(codes | {0})


def test_the_cost_is_the_paper_models() -> None:
    from benchmarks.paper import ARITHMETIC_SHARE, CARDS

    on_paper = {cells[0]: cells for cells in table(section("benchmarks.md", "GPUs on paper"))}
    said = {cells[0]: cells[1:] for cells in table(section("cost.md", "GPUs, on paper"))}
    assert set(said) == set(on_paper) == {card.name for card in CARDS}
    assert "529 GFLOP" in (DOCS / "log.md").read_text()
    for card in CARDS:
        rate, hours = on_paper[card.name][7], on_paper[card.name][9]
        seconds = 1 / float(rate.replace(",", "")) + 529e9 / (ARITHMETIC_SHARE * card.flops)
        assert said[card.name] == [rate, hours, f"{1 / seconds:,.0f}", f"{1e6 * seconds / 3600:.3f}"]


def test_measured_figures_of_the_readme_stand_in_the_benchmarks_beside_their_command() -> None:
    benchmarks = (DOCS / "benchmarks.md").read_text()
    rows = [row for row in table(README.read_text()) if len(row) == 3]
    assert len(rows) >= 5
    for _, figures, command in rows:
        assert command.strip("`") in benchmarks
        for number in re.findall(r"\d[\d.,]*\d|\d", figures):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", benchmarks), number


def test_what_is_claimed_of_the_demo_was_measured() -> None:
    claims = json.loads((ROOT / "demo" / "claims.json").read_text())
    own = f"{claims['transfer']['own_datastore']['accuracy']:.0%}"
    assert claims["transfer"]["training_datastore"]["accuracy"] < 0.005, "the pages say that none is right"
    readme, questions = (" ".join(page.read_text().split()) for page in (README, DOCS / "faq.md"))
    assert f"with their own datastore {own} of the scenes" in readme
    in_domain = f"{claims['in_domain']['own_datastore']['accuracy']:.0%}"
    assert f"{in_domain} of the scenes of training domains are described exactly, and {own} of those" in questions
