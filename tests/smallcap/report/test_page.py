"""The page is one file that asks for nothing, and what a run holds cannot become a part of it."""

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from smallcap.report.page import as_script_text


@given(st.text() | st.sampled_from(["</script>", "<!--<script>", "\u2028", "]]>", "&lt;", "</SCRIPT foo>"]))
def test_data_cannot_end_its_script_and_is_read_as_it_was(text: str) -> None:
    written = as_script_text({"rows": [{"text": text, text: float("nan")}]})
    assert "<" not in written
    assert json.loads(written) == {"rows": [{"text": text} | {text: None}]}


def test_numbers_that_json_has_not_are_null() -> None:
    written = as_script_text({"values": [float("inf"), float("nan"), 1.5]})
    assert json.loads(written) == {"values": [None, None, 1.5]}
    assert not re.search("NaN|Infinity", written)
