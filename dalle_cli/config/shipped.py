"""The recipes that come with the package, and copies of them with settings filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).parents[1]


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    # A wheel has them inside the package, a working copy of the sources beside it.
    folder = next((place for place in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if place.is_dir()), None)
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def shipped_recipe(name: str) -> Path | None:
    """Return the shipped recipe with this name, which may end with .yaml; None if there is none."""
    return shipped_recipes().get(name.removesuffix(".yaml"))


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """Return the text of a recipe with other values at dotted keys; comments and the order of keys stay.

    Keys must be in the text and hold scalars.

    Raises:
        KeyError: a key is not there.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    spans = sorted(((_scalar(root, key), value) for key, value in values.items()), key=lambda span: -span[0].start)
    for span, value in spans:
        several = isinstance(value, str) and len(value.splitlines()) > 1  # in double quotes they are one line
        style = '"' if several else None
        dumped = yaml.safe_dump(value, default_style=style, default_flow_style=True, allow_unicode=True, width=10**6)
        written = dumped.split("\n")[0]
        rest, newline, following = text[span.stop :].partition("\n")
        text = text[: span.start] + written + _realigned(rest, len(written) - len(span)) + newline + following
    return text


def _scalar(root: Any, key: str) -> range:
    """Return the place of a scalar in the text that was composed into ``root``."""
    node = root
    for name in key.split("."):
        found = {pair[0].value: pair[1] for pair in node.value} if isinstance(node, yaml.MappingNode) else {}
        node = found.get(name)
    if not isinstance(node, yaml.ScalarNode):
        raise KeyError(key)
    return range(node.start_mark.index, node.end_mark.index)


def _realigned(rest: str, longer: int) -> str:
    """Return the rest of a line after a value that became ``longer``, its comment in the old column if possible."""
    found = re.search(r" {2,}(?=#)", rest)
    if found is None:
        return rest
    return rest[: found.start()] + " " * max(2, len(found.group()) - longer) + rest[found.end() :]
