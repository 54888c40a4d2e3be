"""What a search imports: it answers a person, who waits."""

from __future__ import annotations

import json

from tests.python_process import run_python

SCRIPT = """
import json, sys
from jobs.search import search
from jobs.terminal.call_options import SearchOptions
found = search(SearchOptions(index={index!r}, text="3 dog on the sea", k=1))
print(json.dumps([found[0].text, round(found[0].score, 3), sorted({heavy!r} & sys.modules.keys())]))
"""


def test_a_search_by_text_answers_without_torch_or_ray(index: str) -> None:
    heavy = {"torch", "transformers", "open_clip", "ray"}
    text, score, imported = json.loads(run_python(SCRIPT.format(index=index, heavy=heavy)))
    assert (text, score, imported) == ("3 dog on the sea", 1.0, [])
