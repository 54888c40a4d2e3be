"""docs/notebook.ipynb: what it shows is what its cells show today. After a change of the demo: `make notebook`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
NUMBER = r"-?\d+\.\d+"


def texts(cell: Any) -> str:
    """Returns what a cell shows, as text, with single spaces: columns of tables are as wide as their widest number."""
    shown = [output.get("text", output.get("data", {}).get("text/plain")) for output in cell.get("outputs", ())]
    assert None not in shown, "a cell has failed"
    return " ".join("\n".join(text if isinstance(text, str) else "".join(text) for text in shown).split())


def test_it_was_executed_from_top_to_bottom() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(texts(cell)) for cell in cells) > len(cells) / 2
    stored = json.dumps(NOTEBOOK)
    assert len(stored) < 500_000
    assert not re.search(r"/(?:home|tmp|root|Users|work)/", stored)


def test_its_links_lead_to_pages() -> None:
    prose = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


@pytest.mark.own_ray
@pytest.mark.slow
def test_its_cells_show_what_is_stored() -> None:
    from demo.notebook import execute, read_notebook

    stored = read_notebook()
    for cell, before in zip(execute(stored).cells, stored.cells, strict=True):
        now, then = texts(cell), texts(before)
        assert re.sub(NUMBER, "#", now) == re.sub(NUMBER, "#", then), cell.source
        scores = [[float(number) for number in re.findall(NUMBER, text)] for text in (now, then)]
        assert scores[0] == pytest.approx(scores[1], abs=0.011), cell.source  # rounded to two digits
