"""Options that commands share, and the usage line of every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest
from conftest import Call
from typer.main import get_command

from dalle_cli.app import app


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


def options(command: click.Command) -> Iterator[tuple[click.Parameter, Any]]:
    """Yield each parameter of a command and of those below it, with its type."""
    types = get_type_hints(command.callback) if command.callback else {}
    for parameter in command.params:
        yield parameter, types.get(str(parameter.name))
    for below in getattr(command, "commands", {}).values():
        yield from options(below)


@pytest.mark.parametrize(
    ("name", "kinds", "shown"),
    [
        ("--captions", {Path}, "FILE"),
        ("--data", {str, list[str]}, "SOURCE"),
        ("--out", {Path}, None),
        ("--limit", {int}, None),
        ("--shard", {str}, "I/N"),
        ("--json", {bool}, None),
    ],
)
def test_an_option_means_one_thing_in_all_commands(name: str, kinds: set[Any], shown: str | None) -> None:
    found = [(option, kind) for option, kind in options(get_command(app)) if name in option.opts]
    assert len(found) > 1
    assert {kind if kind in kinds else get_args(kind)[0] for _, kind in found} == kinds
    if shown is not None:
        assert {getattr(option, "metavar", None) for option, _ in found} == {shown}
    if name == "--json":
        assert {getattr(option, "help", None) for option, _ in found} == {"Print JSON."}


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
