"""``dalle eval-fid``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dalle_cli.commands.options import named_systems


def command(
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="[GENERATED] REFERENCE", help="Folder or tars of pictures, sample lines, a sample store; then real."
        ),
    ],
    system: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=GENERATED", help="Several systems, in place of GENERATED; repeatable."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure pictures of these alone: text, .jsonl with ids, or COCO's .json."),
    ] = None,
    preset: Annotated[
        Literal["coco", "cub"] | None, typer.Option(help="REFERENCE is this set as published; draws its captions.")
    ] = None,
    draw: Annotated[int, typer.Option(min=2, help="Captions that a preset draws.")] = 30_000,
    write_captions: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="Write the preset's captions for dalle sample, and end.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="At most so many captions (or pictures) a system, drawn by the seed.")
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Pictures are cropped and resized to this side first.")] = 256,
    blur: Annotated[str, typer.Option(help="Radii in pixels, both sides blurred: 0,1,2,4,8.")] = "0",
    pool: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Rerank by the scores at these sizes: 1,2,4,...,512.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Random subsets of each pool size.")] = 10,
    bootstrap: Annotated[int, typer.Option(min=0, help="Rounds for the standard errors of FID and IS.")] = 20,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights; fetched if there is a network.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Measure by this CLIP's features instead; the figures are named so.")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="Tag or weights file of an open_clip model.")] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --clip: captions of classes, for a score like IS.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides captions, subsets, bootstrap and splits.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of features, kept by content. \\[the user's cache]", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write index.html, JSON, CSV and plots into this folder.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Captions shown side by side on the page.")] = 16,
) -> None:
    """FID, KID, Inception Score, precision and recall of pictures against real ones, by torch-fidelity.

    Without Inception's weights, --clip measures by CLIP features; its figures do not compare with Inception's. With
    --pool, a system whose samples have scores stands for itself with the best of each caption's whole pool. Killed,
    it goes on where it stopped.

    Example: [bold]dalle eval-fid runs/quickstart/ranked.jsonl runs/quickstart/shapes/seen --size 64
    --clip runs/quickstart/clip[/bold]

    Example: [bold]dalle eval-fid --system best=runs/quickstart/ranked.jsonl --system real=runs/quickstart/shapes/train
    runs/quickstart/shapes/seen --size 64 --clip runs/quickstart/clip --blur 0,1,2,4,8 --pool 1,2,4,...,32
    --page runs/quickstart/evaluation[/bold]
    """
    import json

    from dalle_cli.data.captions import read_captions_by_id
    from dalle_cli.errors import UserError
    from dalle_cli.fid.pools import parse_pool_sizes, parse_radii
    from dalle_cli.fid.presets import open_preset

    if inception_weights is not None and clip is not None:
        raise UserError("--inception-weights and --clip exclude each other; choose the features to measure by")
    if classes is not None and clip is None:
        raise UserError("--classes are captions that --clip compares pictures with; Inception has classes of its own")
    if preset is not None and captions is not None:
        raise UserError("--preset and --captions exclude each other: a preset draws its own captions")
    if write_captions is not None and preset is None:
        raise UserError("--write-captions writes the captions that a preset draws; give --preset coco or cub")
    named = _named(pictures, system or [], write_captions is not None)
    reference = pictures[-1]
    radii, sizes = parse_radii(blur), parse_pool_sizes(pool) if pool is not None else []
    published = open_preset(preset, reference, draw, seed) if preset is not None else None
    if write_captions is not None and published is not None:
        from dalle_cli.stores.files import write_atomically

        lines = [json.dumps({"id": i, "caption": c}, ensure_ascii=False) for i, c in published.captions.items()]
        write_atomically(write_captions, "\n".join(lines) + "\n")
        typer.echo(write_captions)
        return
    wanted = published.captions if published else read_captions_by_id(captions) if captions is not None else None

    from dalle_cli.fid.pictures import FilePictures, open_pictures
    from dalle_cli.fid.systems import open_system

    systems = [open_system(name, spec, size, wanted, limit, seed) for name, spec in named.items()]
    real = FilePictures(published.reference, size) if published else open_pictures(reference, size)

    from dalle_cli.distributed.device import choose_device, prepare_process
    from dalle_cli.fid.comparison import FORMAT, VERSION, Settings, compare_systems
    from dalle_cli.fid.features import clip_features, default_cache, inception
    from dalle_cli.stores.files import write_json
    from dalle_cli.stores.provenance import command_line

    device = choose_device()
    prepare_process(device)
    if clip is not None:
        from dalle_cli.clip.scoring import load_scorer

        scorer = load_scorer(clip, pretrained, None, beside=Path(clip), device=device)
        named_classes = list(read_captions_by_id(classes).values()) if classes is not None else []
        features = clip_features(scorer, named_classes, device=device)
    else:
        features = inception(inception_weights, device=str(device))
    settings = Settings(radii, sizes, repeats, bootstrap, seed)
    found = compare_systems(systems, real, features, settings, cache or default_cache())
    figures: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "command": command_line(), "reference": reference, "size": size,
        "seed": seed, "bootstrap": bootstrap,
    } | found  # fmt: skip
    if published:
        figures |= {"protocol": published.protocol, "warnings": published.warnings + found["warnings"]}
    if page is not None:
        from dalle_cli.fid.page import choose_grid, true_pictures_of, write_evaluation

        grid = choose_grid(systems, true_pictures_of(published, real), rows, seed)
        write_evaluation(figures, grid, page)
    if not system:
        # One system's figures lie on top, as a script that reads them expects.
        (only,) = found["systems"]
        figures = {**{k: v for k, v in figures.items() if k != "systems"}, **only,
                   "warnings": [*figures["warnings"], *only["warnings"]]}  # fmt: skip
        del figures["name"]
    if out is not None:
        write_json(out, figures)
    typer.echo(json.dumps(figures, indent=2))


def _named(pictures: list[str], systems: list[str], captions_only: bool) -> dict[str, str]:
    """GENERATED by name."""
    from dalle_cli.errors import UserError

    if systems or captions_only:
        if len(pictures) != 1:
            raise UserError(f"with --system the only argument is REFERENCE, not {' '.join(pictures)}")
    elif len(pictures) != 2:
        raise UserError("give GENERATED and REFERENCE, or --system NAME=GENERATED ... REFERENCE")
    else:
        return {"generated": pictures[0]}
    return named_systems(systems, "NAME=GENERATED", "ours=ranked.jsonl")
