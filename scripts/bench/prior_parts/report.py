"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def render(results: dict[str, dict[str, Any]]) -> str:
    """One section a part: what it ran on, its rows, its ratios with the goals they have."""
    lines = ["# Measurements of the prior", ""]
    for name, found in results.items():
        machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if key != "command")
        sizes = ", ".join(f"{key} {value}" for key, value in found.get("sizes", {}).items())
        lines += [f"## {name}", "", f"`{found['machine']['command']}`: {machine}.", ""]
        lines += [f"Sizes: {sizes}.", ""] if sizes else []
        lines += [*_table(found["rows"]), ""]
        if found["ratios"]:
            lines += [*_table(found["ratios"]), ""]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> Iterable[str]:
    columns = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    )
    yield "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    yield "|" + "|".join("---" for _ in columns) + "|"
    for row in rows:
        yield "| " + " | ".join(_cell(row.get(column)) for column in columns) + " |"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
