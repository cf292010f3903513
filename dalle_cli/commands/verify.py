"""``dalle verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, checkpoint, token store or folder of samples.")],
) -> None:
    """Read every byte of a run, checkpoint, store or folder of samples, and name what is damaged or missing.

    Journals and reports are left out, since no stage reads them.

    It prints one line for each damaged file and exits with code 2 if there is any.

    Example: [bold]dalle verify runs/quickstart/prior[/bold]
    """
    from dalle_cli.errors import UserError
    from dalle_cli.progress import printable
    from dalle_cli.stores.verify import verify

    found = verify(path)
    for message in found.damage:
        typer.echo(printable(message))
    if found.damage:
        total = len(found.checked)
        raise UserError(f"{path}: {len(found.damage)} of {total} files and checkpoints are damaged or missing")
    typer.echo(f"{path}: {len(found.checked)} files and checkpoints are whole")
