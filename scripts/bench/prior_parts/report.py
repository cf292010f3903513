"""Describe the machine of a measurement, and render results as Markdown tables."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HEADING = """\
# Speed and memory of the prior

Written by `scripts/bench/prior`, from the results in the JSON file beside it. A ratio is the time (or memory) of the
peer divided by ours, so that above 1 ours is better. A goal is the bound that the figure beside it should meet.
"""


def describe_machine(device: str) -> dict[str, str | int]:
    """Return the processor, versions, date and command of this run."""
    description: dict[str, str | int] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["scripts/bench/prior", *sys.argv[1:]]),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        description["gpu"] = torch.cuda.get_device_name()
    with suppress(PackageNotFoundError):
        description["dalle-pytorch"] = version("dalle-pytorch")
    return description


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return a section for each part: the machine, the sizes, the measured rows, and the ratios with their goals."""
    lines = [HEADING]
    for name, part in results.items():
        machine = ", ".join(f"{key} {value}" for key, value in part["machine"].items() if key != "command")
        sizes = ", ".join(f"{key} {value}" for key, value in part.get("sizes", {}).items())
        lines += [f"## {name}", "", f"`{part['machine']['command']}`: {machine}.", ""]
        lines += [f"Sizes: {sizes}.", ""] if sizes else []
        lines += [*_table(part["rows"]), ""]
        if part["ratios"]:
            lines += [*_table(part["ratios"]), ""]
    return "\n".join(lines)


def _processor() -> str:
    """Return the processor's name from /proc/cpuinfo, or from Python where there is no such file."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


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
