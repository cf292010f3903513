"""HTML pages from templates; each page is one file with style and pictures embedded."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

Pngs = Mapping[str, bytes]
"""PNG pictures by name."""


def render(template: str, **values: object) -> str:
    """Render a file of the ``templates`` folder; ``values`` are escaped."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dalle_cli.views", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png_uri"] = png_uri
    environment.filters["svg_uri"] = svg_uri
    # No-break spaces keep numbers and their signs on one line.
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")
    return environment


def png_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def svg_uri(svg: bytes) -> str:
    """Return an SVG as a data URI."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
