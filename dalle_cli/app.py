"""The command line: a Typer app that lists the commands and imports nothing heavy."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from dalle_cli import __version__
from dalle_cli.commands import (
    encode_images,
    eval_fid,
    export,
    human_study,
    import_dvae,
    index,
    init,
    make_shapes,
    overlap,
    plan,
    reconstruct,
    report,
    rerank,
    run,
    sample,
    scan,
    show,
    tokenize_text,
    train_clip,
    train_dvae,
    train_prior,
    train_tokenizer,
    verify,
)
from dalle_cli.commands.options import Command
from dalle_cli.errors import RESUMABLE, Stopped, UserError, explain_system_error
from dalle_cli.progress import printable

app = typer.Typer(
    name="dalle",
    help="Train and run a DALL-E, from captioned pictures to scored samples. Commands are listed in the order of the "
    "pipeline; each reads and writes plain files, and resumes if it was killed and is run again.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "All stages": {"init": init.command, "run": run.command},
    "1. Data": {
        "make-shapes": make_shapes.command,
        "scan": scan.command,
        "index": index.command,
        "overlap": overlap.command,
    },
    "2. Text tokens": {"train-tokenizer": train_tokenizer.command, "tokenize-text": tokenize_text.command},
    "3. Image tokens": {
        "train-dvae": train_dvae.command,
        "import-dvae": import_dvae.command,
        "reconstruct": reconstruct.command,
        "encode-images": encode_images.command,
    },
    "4. The prior": {
        "plan": plan.command,
        "train-prior": train_prior.command,
        "export": export.command,
        "sample": sample.command,
    },
    "5. Scores": {"train-clip": train_clip.command, "rerank": rerank.command, "eval-fid": eval_fid.command},
    "Look": {"show": show.command, "report": report.command, "verify": verify.command},
}


def paragraphs(docstring: str | None) -> str:
    """Join the lines of each paragraph of a docstring, so that help wraps at the terminal's width."""
    parts = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


for panel, commands in PANELS.items():
    for name, function in commands.items():
        # rerank reads stdin when it is given nothing.
        described = paragraphs(function.__doc__)
        register = app.command(
            name, cls=Command, help=described, rich_help_panel=panel, no_args_is_help=name != "rerank"
        )
        register(function)
for sub_command in human_study.app.registered_commands:
    sub_command.cls, sub_command.help = Command, paragraphs(inspect.getdoc(sub_command.callback))
app.add_typer(human_study.app, name="human-study", rich_help_panel="5. Scores")

INTERRUPTED = 130
"""Typer's exit code for ctrl-C."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dalle {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; allowed anywhere.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Declare the options of all commands.

    ``main`` reads --debug. DeepSpeed's launcher adds --local_rank, which the environment says too.
    """


def main() -> None:
    """Run the command line and end the process."""
    try:
        run_arguments()
    except BaseException as end:
        if groups := sys.modules.get("dalle_cli.distributed.group"):  # loaded only where a command trains
            if isinstance(end, SystemExit):
                groups.exit_rank(end.code if isinstance(end.code, int) else int(end.code is not None))
            groups.exit_rank(1, end)
        raise


def run_arguments() -> None:
    """Run the command that ``sys.argv`` gives.

    Raises:
        SystemExit: always, with code 2 after a UserError or a fault of the disk or the memory, and with RESUMABLE if a
            signal stopped training.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # files are UTF-8 whatever the locale, and so are pipes
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace")
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        try:
            app()
        except SystemExit as end:
            if not end.code and sys.stdout is not None:
                sys.stdout.flush()
            raise
    except BrokenPipeError:
        _drop_stdout()
        sys.exit(1)
    except (UserError, OSError, MemoryError) as error:
        if debug:
            raise
        message = str(error) if isinstance(error, UserError) else explain_system_error(error)
        for line in message.splitlines():
            print(f"dalle: {printable(line)}", file=sys.stderr)
        _drop_stdout()
        sys.exit(2)
    except Stopped:
        sys.exit(RESUMABLE)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("dalle: stopped; the same command goes on from what it has saved, if anything", file=sys.stderr)
        raise


def _drop_stdout() -> None:
    """Drop what stdout could not take, since Python would try again at its exit and complain of it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
