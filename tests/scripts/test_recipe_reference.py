"""docs/recipe.md and the JSON Schema of recipes are current and know every setting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Call

from dalle_cli.config.schema import Recipe
from dalle_cli.config.shipped import SCHEMA

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "scripts" / "recipe-reference"], capture_output=True, text=True, check=True
    ).stdout
    assert printed == PAGE, "run scripts/recipe-reference > docs/recipe.md"


@pytest.mark.parametrize(
    ("block", "row"),
    [
        ("dvae.learning_rate", "| `peak` | number | `0.0001` |"),
        ("prior.adam", "| `weight_decay` | number | `0.045` |"),
        ("dvae.objective", "| `temperature` | number, or `{start, end, updates, shape}` | "
         "`{start: 1, end: 0.0625, updates: 150000}` |"),
        ("prior.sharding", "| `zero` | `0`, `1`, `2`, `3` | `0` |"),
        ("sampling", "| `n` | whole number | `512` |"),
    ],
)  # fmt: skip
def test_settings_are_in_their_block_with_the_default_of_their_stage(block: str, row: str) -> None:
    section = PAGE.split(f"## `{block}`\n")[1].split("\n## ")[0]
    assert row in section


def test_every_block_has_a_section_and_every_setting_a_meaning() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert all(line.rsplit("|", 2)[1].strip() for line in rows)

    def settings(block: dict[str, object]) -> int:
        is_ramp = "shape" in block
        return 1 if is_ramp else sum(settings(v) if isinstance(v, dict) else 1 for v in block.values())

    assert len(rows) == settings(Recipe().model_dump())


def faults(value: Any, schema: dict[str, Any], blocks: dict[str, Any], place: str = "") -> list[str]:
    """Return the places in ``value`` that an editor would mark: unknown keys, and blocks in place of values."""
    if "$ref" in schema:
        return faults(value, blocks[schema["$ref"].rpartition("/")[2]], blocks, place)
    if "anyOf" in schema:
        return min((faults(value, each, blocks, place) for each in schema["anyOf"]), key=len)
    if not isinstance(value, dict):
        return [place] if schema.get("type") == "object" else []
    if schema.get("type") != "object":
        return [place]
    known = schema["properties"]
    assert not schema["additionalProperties"]
    assert "required" not in schema
    return [
        each
        for key, below in value.items()
        for each in (faults(below, known[key], blocks, f"{place}.{key}") if key in known else [f"{place}.{key}"])
    ]


def test_editors_find_the_schema_of_each_recipe_and_mark_nothing_in_it(call: Call, tmp_path: Path) -> None:
    file = ROOT / "recipes" / SCHEMA
    assert file.read_text() == call("show", "--schema").out, f"run dalle show --schema > recipes/{SCHEMA}"
    schema = json.loads(file.read_text())
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        text = recipe.read_text()
        assert text.startswith(f"# yaml-language-server: $schema={SCHEMA}\n")
        assert faults(yaml.safe_load(text), schema, schema["$defs"]) == []
    assert faults({"prior": {"modle": {}, "training": {"updates": 3}}}, schema, schema["$defs"]) == [".prior.modle"]
    copy = tmp_path / "mine.yaml"
    assert call("init", copy).code == 0
    named = copy.read_text().splitlines()[0].partition("$schema=")[2]
    assert Path(named).read_text() == file.read_text()
