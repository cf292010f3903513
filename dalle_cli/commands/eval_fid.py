"""``dalle eval-fid``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    generated: Annotated[str, typer.Argument(metavar="GENERATED", help="Folder or tars of pictures, or sample lines.")],
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="Folder or tars of real pictures.")],
    size: Annotated[int, typer.Option(min=8, help="Pictures are cropped and resized to this side first.")] = 256,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights; fetched if there is a network.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Measure by this CLIP's features instead; the figures are named so.")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="Tag or weights file of an open_clip model.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses KID's subsets and the score's splits.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """FID, KID and Inception Score of pictures against real ones, by torch-fidelity.

    Without Inception's weights, --clip measures by CLIP features; its figures do not compare with Inception's.

    Example: [bold]dalle eval-fid runs/quickstart/samples/... runs/shapes/seen --size 64 --clip runs/quickstart/clip
    [/bold]
    """
    import json

    from dalle_cli.errors import UserError
    from dalle_cli.evaluation.pictures import open_pictures

    if inception_weights is not None and clip is not None:
        raise UserError("--inception-weights and --clip exclude each other; choose the features to measure by")
    pictures, real = open_pictures(generated, size), open_pictures(reference, size)

    from dalle_cli.evaluation.features import clip_features, inception
    from dalle_cli.evaluation.fid import evaluate
    from dalle_cli.stores.files import write_json

    if clip is not None:
        from dalle_cli.clip.load import load_scorer

        features = clip_features(load_scorer(clip, pretrained, None, beside=Path(clip)))
    else:
        features = inception(inception_weights)
    figures = {"generated": generated, "reference": reference, "size": size} | evaluate(
        pictures, real, features, seed=seed
    )
    if out is not None:
        write_json(out, figures)
    typer.echo(json.dumps(figures, indent=2))
