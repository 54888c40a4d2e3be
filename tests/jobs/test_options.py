from pathlib import Path

from jobs.options import render_page


def test_the_page_of_options_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert page.read_text() == render_page(), "run `make docs`"
