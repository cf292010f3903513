"""The log lines of a process while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.killed_runs import TIMED


def lines(run: Path) -> list[dict[str, Any]]:
    """The journal without what depends on the time."""
    found = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in found]
