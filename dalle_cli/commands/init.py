"""``dalle init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.errors import UserError


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME] FILE", help="Name of a shipped recipe, own-data if left out; the new file."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help="Captioned pictures, which the settings are chosen for."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=1, help="Time for training, over all stages; a few updates are timed on this machine."),
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Copy the batch files for Slurm into the new folder scripts/slurm.")
    ] = False,
) -> None:
    """Copy a commented recipe into a new file, and fill in what follows from your data.

    With --data, all samples are scanned first: their number, captions and pictures decide on the vocabulary, the length
    of captions, cropping and the share held out. With --minutes too, the numbers of updates fit that time.

    Example: [bold]dalle init my-recipe.yaml[/bold]
    """
    from dalle_cli.config.shipped import SCHEMA, shipped_recipe, shipped_recipes, with_values
    from dalle_cli.progress import log
    from dalle_cli.stores.files import write_atomically

    if slurm:
        _copy_batch_files(Path("scripts/slurm"))
        if not names:
            return
    if not names or len(names) > 2:
        given = f"{len(names)} names are given" if names else "the new file is not named"
        raise UserError(f"init: {given}; write dalle init [NAME] FILE, such as dalle init my.yaml")
    name, file = (names[0] if len(names) == 2 else "own-data"), Path(names[-1])
    if (template := shipped_recipe(name)) is None:
        raise UserError(f"init: there is no recipe {name}; there are {', '.join(shipped_recipes())}")
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: a recipe is a YAML file; name it {file}.yaml")
    if file.exists():
        raise UserError(f"{file}: exists already; choose another name, or delete it")
    if minutes is not None and data is None:
        raise UserError("--minutes: the updates depend on the data; give --data SOURCE too")
    text = template.read_text(encoding="utf-8").replace(f"$schema={SCHEMA}", f"$schema={template.with_name(SCHEMA)}")
    values = {"name": file.stem, "run": f"runs/{file.stem}"}
    if data is not None:
        from dalle_cli.planning.new_recipe import fill_in

        values |= fill_in(template, data, minutes)
    try:
        text = with_values(text, values)
    except KeyError as error:
        raise UserError(
            f"init: the recipe {name} does not say {error.args[0]}, so it cannot be filled in; leave out --data, and "
            "edit the copy"
        ) from None
    write_atomically(file, text.encode())
    if data is not None:
        log(f"next: dalle run {file}")
    elif name == "own-data":
        log(f"next: name your pictures under data.train, then dalle run {file}")
    typer.echo(file)


def _copy_batch_files(folder: Path) -> None:
    import shutil

    from dalle_cli.config.shipped import slurm_files
    from dalle_cli.stores.files import new_directory

    if folder.exists():
        raise UserError(f"{folder}: exists already; its batch files are kept")
    with new_directory(folder) as unfinished:
        for file in slurm_files():
            shutil.copy(file, unfinished)  # with the permission to be run
    typer.echo(folder)
