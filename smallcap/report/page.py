"""Writes a report as one HTML file: styles, script, data and pictures are inside, and nothing is loaded from elsewhere.

Whatever a caption or a file's name holds is text. Jinja escapes what stands in the page itself. The rest is JSON in a
script element that is no program, without any `<` that could end it. The page's own policy forbids every request, and
every script but the one that is named by its hash.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from smallcap.output.webdataset import plain_values


def render_page(facts: Mapping[str, Any], data: Mapping[str, Any]) -> bytes:
    """Returns the page.

    Args:
        facts: What the template shows; see `template/page.html.j2`.
        data: What the page's script shows, plain values; see `template/page.js`.
    """
    style, script = _text("style.css"), _text("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = _template().render(
        facts, style=Markup(style), script=Markup(script), policy=policy, data=Markup(as_script_text(data))
    )
    return page.encode()


def as_script_text(data: Mapping[str, Any]) -> str:
    """Returns JSON that cannot end the script element that it stands in, nor begin a comment there."""
    text = json.dumps(plain_values(dict(data)), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _text(name: str) -> str:
    return (resources.files("smallcap.report") / "template" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("smallcap.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["bytes"] = _bytes
    return environment.get_template("page.html.j2")


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} bytes"
