"""Recipes and batch files that come with the package, and copies of recipes with settings filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).parents[1]
SCHEMA = "recipe.schema.json"
"""File beside the recipes that their first lines name for editors: what ``dalle show --schema`` prints."""


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    return {file.stem: file for file in _files("recipes", "recipes") if file.suffix == ".yaml"}


def slurm_files() -> list[Path]:
    """Return the batch files for Slurm that come with the package, and their README."""
    return _files("slurm", "scripts/slurm")


def _files(packaged: str, copied: str) -> list[Path]:
    """Return the files of a folder: it lies inside the package in a wheel, and beside it in a copy of the sources."""
    folders = (PACKAGE / packaged, PACKAGE.parent / copied)
    return next((sorted(folder.iterdir()) for folder in folders if folder.is_dir()), [])


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
