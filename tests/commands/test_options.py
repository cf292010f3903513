"""Options that commands share, and the usage line of every command."""

from __future__ import annotations

import pytest
from conftest import Call


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("tokenize-text", "RECIPE"),
        ("plan", "[RECIPE]"),
        ("sample", "PRIOR [PROMPT]..."),
        ("rerank", "[MANIFEST]..."),
        ("reconstruct", "IMAGE..."),
        ("eval-fid", "[GENERATED] REFERENCE"),
        ("overlap", "TRAIN [EVAL]"),
    ],
)
def test_the_usage_line_is_as_is_customary(call: Call, command: str, usage: str) -> None:
    (line,) = [line for line in call(command, "--help").out.splitlines() if "Usage:" in line]
    assert line.split("Usage:")[1].strip() == f"dalle {command} [OPTIONS] {usage}"
