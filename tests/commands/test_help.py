"""--help of all commands: nothing that it should say is taken for rich's markup."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer
from rich.text import Text
from typer.main import get_command

from dalle_cli.app import app


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for below, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, f"{name} {below}")


COMMANDS = dict(commands(get_command(app), "dalle"))


@pytest.mark.parametrize("name", COMMANDS)
def test_only_bold_is_markup(name: str) -> None:
    """Rich drops what stands in brackets and begins with a small letter, such as the name of a setting, silently."""
    command = COMMANDS[name]
    for text in (command.help, *(getattr(option, "help", None) for option in command.params)):
        styles = {str(span.style) for span in Text.from_markup(text or "").spans}
        assert styles <= {"bold"}, text


def test_names_of_settings_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    with pytest.raises((SystemExit, typer.Exit)):
        get_command(app)(["sample", "--help"], prog_name="dalle")
    shown = capsys.readouterr().out
    assert "[sampling.n]" in shown
    assert "[RUN/samples/...]" in shown
    assert "\\[" not in shown
