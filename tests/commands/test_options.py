"""Options that commands share, and the usage line of every command."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sample", "prior", "a star", "--temperature", "nan"), "--temperature': Input should be greater than"),
        (("sample", "prior", "a star", "--guidance", "inf"), "inf is no finite number"),
        (("overlap", "pictures", "--similarity", "nan"), "Invalid value for '--similarity'"),
        (("init", "new.yaml", "--data", "pictures", "--minutes", "inf"), "inf is no finite number"),
        (("plan", "12b", "--price", "nan"), "Invalid value for '--price'"),
        (("plan", "12b", "--share", "nan"), "nan is no finite number"),
        (("sample", "prior", "a star", "--seed", 10**30), "is above 9007199254740992"),
        (("make-shapes", "world", "--size", -(10**30)), "is above 9007199254740992"),
        (("human-study", "serve", "study", "--links", 10**30), "should be less than or equal to 10000"),
    ],
)
def test_numbers_that_no_option_means_are_refused(call: Call, arguments: tuple[object, ...], said: str) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert said in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err


def test_the_place_of_an_output_is_looked_at_before_the_work(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for arguments in (
        ("overlap", "pictures", "--out", tmp_path),
        ("overlap", "pictures", "--sheet", tmp_path),
        ("rerank", "lines.jsonl", "--sheet", tmp_path),
        ("eval-fid", "a", "b", "--out", tmp_path),
        ("eval-fid", "a", "b", "--page", tmp_path / "file"),
        ("scan", "pictures", "--out", tmp_path / "file"),
    ):
        done = call(*arguments)
        assert done.code == 2
        told = " ".join(done.err.replace("│", " ").split())
        assert f"Invalid value for '{arguments[-2]}': " in told
        assert "is a directory" in told or "is a file" in told
    assert (tmp_path / "file").read_text() == "mine"
