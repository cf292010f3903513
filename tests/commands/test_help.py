"""--help of all commands: markup, lines, examples."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer
from rich.text import Text
from typer.main import get_command

from dalle_cli.app import app
from dalle_cli.config.load import load_recipe
from dalle_cli.config.run_folders import RunFolders

ROOT = Path(__file__).parents[2]
WRITTEN_BY_EXAMPLES = {
    f"runs/quickstart/{name}"
    for name in (
        *("duplicates.jsonl", "duplicates.png", "evaluation", "export", "openai-dvae", "reconstructions", "scan"),
        "study",
    )
} | {"my-recipe.yaml"}
"""Files and folders that some example names as its output."""


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for below, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, f"{name} {below}")


COMMANDS = dict(commands(get_command(app), "dalle"))


@pytest.fixture(scope="module")
def made_by_quickstart() -> set[str]:
    """Paths that exist after scripts/quickstart."""
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml")
    folders = RunFolders(Path(recipe.run))
    stages = (folders.tokenizer, folders.tokens, folders.dvae, folders.prior, folders.clip, folders.samples)
    script = (ROOT / "scripts/quickstart").read_text()
    named = {f"{recipe.run}/{name}" for name in re.findall(r"\$run/([\w./-]+\w)", script)}
    return {str(recipe.data.train), *map(str, stages), *named}


def shown_help(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises((SystemExit, typer.Exit)):
        get_command(app)([*name.split()[1:], "--help"], prog_name="dalle")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_only_bold_is_markup(name: str) -> None:
    """Rich silently drops a word in brackets that begins with a small letter, such as the name of a setting."""
    command = COMMANDS[name]
    for text in (command.help, *(getattr(option, "help", None) for option in command.params)):
        styles = {str(span.style) for span in Text.from_markup(text or "").spans}
        assert styles <= {"bold"}, text


def test_names_of_settings_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    shown = shown_help("dalle sample", capsys)
    assert "[sampling.n]" in shown
    assert "[RUN/samples/...]" in shown
    assert "\\[" not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_lines_are_broken_only_where_the_next_word_does_not_fit(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    description = shown_help(name, capsys).partition("╭")[0].partition("Usage:")[2]
    lines = description.splitlines()
    for line, following in pairwise(lines):
        if line.strip() and following.strip():
            assert len(line.rstrip()) + 1 + len(following.split()[0]) >= 80, (line, following)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "dalle"])
def test_examples_name_only_what_quickstart_makes(name: str, made_by_quickstart: set[str]) -> None:
    help_text = Text.from_markup(COMMANDS[name].help or "").plain
    examples = " ".join(help_text.split()).split("Example: ")[1:]
    assert examples
    for example in examples:
        assert example.startswith(("dalle ", "for i in "))
        for word in shlex.split(example):
            path = word.partition("=")[2] or word
            if path.startswith("recipes/"):
                assert (ROOT / path).is_file(), path
            elif ("/" in path and "$" not in path) or re.search(r"\.(yaml|jsonl?|txt|png|html)$", path):
                assert path in made_by_quickstart | WRITTEN_BY_EXAMPLES, path
