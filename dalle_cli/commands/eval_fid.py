"""``dalle eval-fid``."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import typer

from dalle_cli.commands.options import named_systems, require_clip
from dalle_cli.errors import UserError


def command(
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="[GENERATED] REFERENCE", help="Pictures in a folder, tars, sample lines or a store; then real ones."
        ),
    ],
    system: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=GENERATED", help="A named system, in place of GENERATED; repeatable."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure only these captions: text, .jsonl with ids, or COCO's .json."),
    ] = None,
    without: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure again without these reference pictures: dalle overlap's lines."),
    ] = None,
    preset: Annotated[
        Literal["coco", "cub"] | None, typer.Option(help="Draw captions of this data set, which REFERENCE names.")
    ] = None,
    draw: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of captions that a preset draws. \\[coco: 30000, cub: all different ones]",
            show_default=False,
        ),
    ] = None,
    write_captions: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", dir_okay=False, help="Only write the preset's captions, for dalle sample."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Largest number of captions (or pictures) per system, drawn by the seed.")
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Side to which pictures are cropped and resized.")] = 256,
    fit: Annotated[
        Literal["crop", "pad", "stretch"],
        typer.Option(help="How reference pictures that are not square become so; give the recipe's data.fit."),
    ] = "crop",
    blur: Annotated[str, typer.Option(help="Radii in pixels to blur both sides by: 0,1,2,4,8.")] = "0",
    pool: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Rerank by the scores at these sizes: 1,2,4,...,512.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Number of random subsets per pool size.")] = 10,
    bootstrap: Annotated[int, typer.Option(min=0, help="Rounds for the standard errors of FID and IS.")] = 20,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights. \\[downloaded]", show_default=False)
    ] = None,
    clip: Annotated[str | None, typer.Option(help="Measure on this CLIP's features instead of Inception's.")] = None,
    network: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="NAME",
            help="Measure on a timm network's features: tf_efficientnet_lite2, or a folder.",
        ),
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="Tag or weights file of an open_clip model.")] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --clip: class captions, for a score like IS.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides captions, subsets, bootstrap sets and splits.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of cached features. \\[the user's cache]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="JSON file for the figures; stdout by default.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="Write index.html, JSON, CSV and plots into this folder."),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Number of captions whose pictures the page shows.")] = 16,
) -> None:
    """Measure FID, KID, Inception Score, precision and recall of pictures against real ones.

    Without Inception's weights, --clip measures on CLIP features and --features on those of a network of timm; these
    results are not comparable with Inception's.
    With --pool, a system whose samples have scores is measured by the best of each caption's whole pool. Some reference
    pictures may have been trained on: [bold]dalle overlap REFERENCE TRAIN --out seen.jsonl[/bold] finds them, and
    [bold]--without seen.jsonl[/bold] adds the figures without them. If it is killed, run it again to resume.

    Example: [bold]dalle eval-fid runs/quickstart/ranked.jsonl runs/quickstart/shapes/seen --size 64
    --clip runs/quickstart/clip[/bold]

    Example: [bold]dalle eval-fid --system best=runs/quickstart/ranked.jsonl --system real=runs/quickstart/shapes/train
    runs/quickstart/shapes/seen --size 64 --clip runs/quickstart/clip --blur 0,1,2,4,8 --pool 1,2,4,...,32
    --page runs/quickstart/evaluation[/bold]
    """
    import json

    from dalle_cli.data.captions import read_captions_by_id
    from dalle_cli.fid.presets import open_preset

    if sum(option is not None for option in (inception_weights, clip, network)) > 1:
        raise UserError("--inception-weights, --clip and --features exclude each other; choose one of them")
    require_clip(clip, pretrained)
    if classes is not None and clip is None:
        raise UserError("--classes needs --clip, since Inception has its own classes; give --clip, or drop --classes")
    if preset is not None and captions is not None:
        raise UserError("--preset and --captions exclude each other: a preset draws its own captions")
    if write_captions is not None and preset is None:
        raise UserError("--write-captions writes the captions that a preset draws; give --preset coco or cub")
    if page is not None:
        from dalle_cli.fid.page import require_own_page

        require_own_page(page)
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

    from dalle_cli.data.exclude import read_keys, require_match
    from dalle_cli.fid.pictures import FilePictures, named_by, open_pictures
    from dalle_cli.fid.systems import open_system

    systems = [open_system(name, spec, size, wanted, limit, seed) for name, spec in named.items()]
    real = FilePictures(published.reference, size, fit) if published else open_pictures(reference, size, fit)

    from dalle_cli.distributed.device import choose_device, device_for_doubles, prepare_process
    from dalle_cli.fid.comparison import Settings, compare_systems
    from dalle_cli.fid.features import inception, named_features
    from dalle_cli.fid.figures import Evaluation, evaluation_json
    from dalle_cli.stores.files import user_cache, write_json
    from dalle_cli.stores.provenance import command_line

    left_out = None
    if without is not None:
        keys = set(read_keys(without, "--without"))
        left_out = named_by(real, keys, Path(reference))
        require_match(without, len(keys), int(left_out.sum()), reference)
    device = device_for_doubles(choose_device())  # torch-fidelity computes in 64 bit
    prepare_process(device)
    if clip is None and network is None:
        features = inception(inception_weights, device=str(device))
    else:
        named_classes = list(read_captions_by_id(classes).values()) if classes is not None else []
        features = named_features(clip, pretrained, network, named_classes, device)
    settings = Settings(radii, sizes, repeats, bootstrap, seed)
    figures, warnings = compare_systems(systems, real, features, settings, cache or user_cache("features"), left_out)
    evaluation = Evaluation(
        command=command_line(),
        reference=reference,
        without=str(without) if without is not None else None,
        size=size,
        seed=seed,
        bootstrap=bootstrap,
        protocol=published.protocol if published else None,
        features=features.name,
        score_name=features.score_name,
        systems=figures,
        warnings=[*(published.warnings if published else []), *warnings],
    )
    if page is not None:
        from dalle_cli.fid.page import choose_grid, true_pictures_of, write_evaluation

        grid = choose_grid(systems, true_pictures_of(published, real), rows, seed)
        write_evaluation(evaluation, grid, page)
    if out is None:
        typer.echo(json.dumps(evaluation_json(evaluation), indent=2))
    else:
        write_json(out, evaluation_json(evaluation))
        typer.echo(out)


def parse_pool_sizes(text: str) -> list[int]:
    """Parse ``1,2,4,8``, or ``1,2,4,...,512`` with dots for doublings, into distinct ascending sizes.

    Raises:
        UserError: it is not a list of counts of 1 or more.
    """
    parts = [part.strip() for part in text.split(",")]
    sizes: set[int] = set()
    for before, part in pairwise(["", *parts]):
        if part == "..." and before.isdecimal() and parts[-1].isdecimal() and int(before) > 0:
            size = 2 * int(before)
            while size < int(parts[-1]):
                sizes.add(size)
                size *= 2
        elif part.isdecimal() and int(part) > 0:
            sizes.add(int(part))
        else:
            raise UserError(f"--pool {text}: is no list of pool sizes; write e.g. 1,2,4,8 or 1,2,4,...,512")
    return sorted(sizes)


def parse_radii(text: str) -> list[float]:
    """Parse the blur's radii in pixels, such as ``0,1,2,4,8``, into distinct ascending radii.

    Raises:
        UserError: one is not a number from 0 to 1,000.
    """
    try:
        radii = sorted({float(part) for part in text.split(",")})
    except ValueError:
        radii = [-1.0]
    if not all(0 <= radius <= 1000 for radius in radii):
        raise UserError(f"--blur {text}: is no list of radii in pixels; write e.g. 0,1,2,4,8")
    return radii


def _named(pictures: list[str], systems: list[str], captions_only: bool) -> dict[str, str]:
    """Return the path of each system's pictures by name; a single GENERATED is called "generated"."""
    if systems or captions_only:
        if len(pictures) != 1:
            raise UserError(f"with --system the only argument is REFERENCE, not {' '.join(pictures)}")
        return named_systems(systems, "NAME=GENERATED", "ours=ranked.jsonl")
    if len(pictures) != 2:
        raise UserError("give GENERATED and REFERENCE, or --system NAME=GENERATED ... REFERENCE")
    return {"generated": pictures[0]}
