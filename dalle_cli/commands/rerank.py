"""``dalle rerank``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    manifest: Annotated[
        Path | None, typer.Argument(metavar="[MANIFEST]", help="Lines of dalle sample; stdin if left out.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Run of train-clip, open_clip model name, or hf-hub:name. [the clip of the samples' run]"),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Tag or weights file of an open_clip model.", show_default=False)
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of our own CLIP. [beside its run]")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Keep the best of each caption. [all]")] = None,
) -> None:
    """Score samples against their captions with CLIP and print them best first.

    Prints the lines it reads with score, rank and scorer added.

    Example: [bold]dalle sample runs/quickstart/prior "a large green circle" --n 32 | dalle rerank --top 1[/bold]
    """
    import json
    from itertools import chain

    from dalle_cli.errors import UserError

    if manifest is None and sys.stdin.isatty():
        raise UserError("nothing to rerank; pipe dalle sample into this command, or name a file of its lines")
    try:
        stream = sys.stdin if manifest is None else manifest.open(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{manifest}: cannot be read ({error.strerror}); name a file of dalle sample's lines") from None

    from dalle_cli.clip.load import load_scorer
    from dalle_cli.clip.rerank import read_manifest, rerank

    lines = read_manifest(stream, str(manifest or "stdin"))
    first = next(lines, None)
    if first is None:
        raise UserError(f"{manifest or 'stdin'}: holds no sample; look at what dalle sample said on stderr")
    scorer = load_scorer(clip, pretrained, tokenizer, beside=Path(first["png"]))
    for line in rerank(chain([first], lines), scorer, top):
        print(json.dumps(line, ensure_ascii=False), flush=True)
