"""``dalle overlap``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import SetOption, ShardOption, read_source, recipe_for, require_clip
from dalle_cli.errors import UserError


def command(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Captioned pictures: folder, tars, manifest ...")],
    evaluation: Annotated[
        str | None, typer.Argument(metavar="EVAL", help="Pictures to compare with; TRAIN itself by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File for the result, such as duplicates.jsonl; stdout by default."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(dir_okay=False, help="PNG file of example pairs, the least similar first.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for thumbnails (3 kB per picture), to resume and for later runs.")
    ] = None,
    similarity: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=1,
            help="Lowest similarity of near-duplicates; 1 means equal. \\[0.8; 0.9 by features]",
            show_default=False,
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Compare by this CLIP's features, which find mirror images and strong crops.")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="Tag or weights file of an open_clip model.")] = None,
    network: Annotated[
        str | None,
        typer.Option("--features", metavar="NAME", help="The same by a timm network: tf_efficientnet_lite0, ..."),
    ] = None,
    shard: ShardOption = "1/1",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe whose data.max_pixels and data.exclude apply to TRAIN.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Find near-duplicates: pictures of TRAIN that are re-encoded, rescaled or slightly cropped copies of one in EVAL.

    Prints a line for each such picture of TRAIN: its key, the key of its nearest match, the distance of their hashes
    in bits, and their similarity. Without EVAL, finds the pictures of TRAIN that repeat an earlier one. To leave these
    pictures out of training, name the file in the recipe: [bold]data.exclude: duplicates.jsonl[/bold].

    Drawings that differ only in a detail or a colour count as near-duplicates too: check --sheet, and raise
    --similarity if needed. Hashes miss mirror images and pictures cropped by more than 5 % at a side. The features of a
    network, by --clip or --features, find many of these, but miss blurred and grey copies that hashes find; put the
    lines of both into one file. With --cache, a killed run can resume, and a comparison with another EVAL need not read
    TRAIN again.

    Jobs of [bold]--shard[/bold] share the work on large sets, and meet in one [bold]--cache[/bold]. Run all shares
    twice: the first time each makes its thumbnails, the second time it compares them with all others, and the last one
    gives the result.

    Example: [bold]dalle overlap runs/quickstart/shapes/train runs/quickstart/shapes/seen
    --out runs/quickstart/duplicates.jsonl --sheet runs/quickstart/duplicates.png[/bold]
    """
    import tempfile

    from dalle_cli.data.open_source import open_source
    from dalle_cli.data.overlap.pairs import SIMILARITY_THRESHOLD
    from dalle_cli.data.overlap.search import Comparison, find_overlap
    from dalle_cli.data.overlap.shares import overlap_share
    from dalle_cli.data.workers import available_cores
    from dalle_cli.progress import log
    from dalle_cli.stores.files import write_atomically
    from dalle_cli.stores.shards import WHOLE, parse_shard

    if clip is not None and network is not None:
        raise UserError("--clip and --features exclude each other; choose one of them")
    require_clip(clip, pretrained)
    share = parse_shard(shard)
    if share != WHOLE and (clip is not None or network is not None):
        raise UserError("--shard is for the comparison of hashes; leave out --clip and --features")
    if share != WHOLE and cache is None:
        raise UserError("--shard needs --cache, the folder where the shares meet")
    settings = recipe_for(train, recipe, set_)
    source, max_pixels = read_source(settings), settings.data.max_pixels
    other = None if evaluation is None else open_source(evaluation)
    with tempfile.TemporaryDirectory(prefix="dalle-overlap-") as temporary:
        folder = cache or Path(temporary)
        if clip is not None or network is not None:
            from dalle_cli.distributed.device import choose_device, device_for_doubles, prepare_process
            from dalle_cli.fid.features import named_features
            from dalle_cli.fid.nearest import THRESHOLD, find_nearest

            device = device_for_doubles(choose_device())  # torch-fidelity, which extracts, computes in 64 bit
            prepare_process(device)
            features = named_features(clip, pretrained, network, [], device)
            found = find_nearest(
                source, other, features, folder, max_pixels=max_pixels, threshold=similarity or THRESHOLD
            )
        else:
            how = Comparison(max_pixels, workers or available_cores(), similarity or SIMILARITY_THRESHOLD)
            if share == WHOLE:
                found = find_overlap(source, other, folder, how)
            elif (joined := overlap_share(source, other, folder, share, how)) is not None:
                found = joined
            else:
                return
    log(found.summary())
    if sheet is not None:
        from dalle_cli.views.source_sheets import pairs_sheet

        picture = pairs_sheet(found, max_pixels)
        if picture is None:
            log(f"{sheet}: not written, since there is no pair to show")
        else:
            write_atomically(sheet, picture)
    if out is None:
        typer.echo(found.to_json_lines(), nl=False)
    else:
        write_atomically(out, found.to_json_lines())
        typer.echo(out)
