"""docs/recipe.md is what scripts/recipe-reference prints, and has every setting with its default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dalle_cli.config.schema import Recipe

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
