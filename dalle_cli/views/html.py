"""HTML pages from templates: each page is one file with style and pictures inside, and fetches nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

Pngs = Mapping[str, bytes]


def render(template: str, **values: object) -> str:
    """Return the page that a file of the ``templates`` folder makes of ``values``, which are escaped."""
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
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")
    return environment


def png_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def document(title: str, body: str, style: str = "") -> str:
    """The whole page; ``body`` is HTML and begins with its header, ``style`` is added to the pages' own."""
    common = files("dalle_cli.views").joinpath("templates/page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{common}{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def unbroken(text: str) -> str:
    """Escaped, with figures held together with their signs at the ends of lines."""
    return escape(text).replace(" %", "&nbsp;%").replace(" ± ", "&nbsp;±&nbsp;")


def section(title: str, *parts: str) -> str:
    """A card under a heading; empty parts are left out."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def absent(text: str) -> str:
    """Says that something is not there, and how it would be."""
    return f'<p class="absent">{escape(text)}</p>'


def warning(text: str) -> str:
    """A paragraph that stands out."""
    return f'<p class="warning">{escape(text)}</p>'


def image(png: bytes | None, alt: str) -> str:
    """The picture, or nothing."""
    if png is None:
        return ""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def plot_grid(pngs: Pngs, names: Sequence[tuple[str, str]]) -> str:
    """Those of ``pngs`` that are there, by (name, title)."""
    drawn = [
        f"<figure><h3>{escape(title)}</h3>{image(pngs[name], title)}</figure>" for name, title in names if name in pngs
    ]
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells are HTML already; columns in ``numbers`` stand to the right."""
    kind = dict.fromkeys(numbers, ' class="number"')
    head = "".join(f"<th{kind.get(i, '')}>{escape(name)}</th>" for i, name in enumerate(header))
    lines = [
        "<tr>" + "".join(f"<td{kind.get(i, '')}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
