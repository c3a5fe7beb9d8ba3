"""The page: one HTML file that needs nothing else."""

import base64
import gzip
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs


def render(content: Mapping[str, Any]) -> str:
    """The page from its content.

    Arguments:
        content: what `template.html.j2` names.

    Returns:
        HTML that loads nothing; the same content gives the same bytes.
    """
    environment = Environment(autoescape=True, trim_blocks=False, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["json"] = lambda value: Markup(_json(value))
    environment.filters["json_text"] = lambda value: json.dumps(value)
    template = environment.from_string(_read("template.html.j2"))
    return template.render(css=Markup(_read("style.css")), script=Markup(_read("page.js")), plotly=_plotly(), **content)


def _json(value: Any) -> str:
    """JSON that may stand in a script element: no tag ends within it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _read(name: str) -> str:
    return resources.files("diffx.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """plotly.js, compressed: 4.8 MB become 2.0; without a date of its own, so that the bytes stay the same."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def picture(svg: bytes) -> str:
    """An SVG as a data URI."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
