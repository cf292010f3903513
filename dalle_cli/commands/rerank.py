"""``dalle rerank``."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dalle_cli.commands.options import CheckpointOption, require_clip


def command(
    manifests: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MANIFEST", help="Lines of dalle sample, or sample stores; stdin if left out."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="Run of train-clip, open_clip model name, hf-hub:name, or local-dir:folder. \\[the samples' run]"
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Tag or weights file of an open_clip model.", show_default=False)
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json of a train-clip run. \\[beside it]")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Print only this many of the best. \\[all]")] = None,
    per_prompt: Annotated[
        bool, typer.Option("--per-prompt/--overall", help="Rank within each caption, or all samples together.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of pictures scored at once.")] = 64,
    sheet: Annotated[
        Path | None, typer.Option(metavar="PNG", dir_okay=False, help="Draw a contact sheet of the first captions.")
    ] = None,
    which: CheckpointOption = "best",
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write the scores into the samples' store.")] = True,
) -> None:
    """Score samples against their captions with CLIP and print them best first.

    Adds score, rank and scorer to each line, and prints a caption's lines as soon as the next caption begins. Samples
    of one caption in several files are ranked together.

    Example: [bold]dalle sample runs/quickstart/prior "a large green star" --n 32 | dalle rerank --top 1[/bold]
    """
    from itertools import chain

    from dalle_cli.errors import UserError

    require_clip(clip, pretrained)
    if not manifests and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError("nothing to rerank; pipe dalle sample into this command, or name a file of its output")
    named = ", ".join(map(str, manifests)) if manifests else "stdin"
    lines = _lines(manifests or [])
    first = next(lines, None)
    if first is None:
        raise UserError(f"{named}: holds no sample; look at what dalle sample said on stderr")

    from dalle_cli.clip.rerank import best_of_all, printed, rerank
    from dalle_cli.clip.scoring import load_scorer
    from dalle_cli.config.run_folders import RunFolders
    from dalle_cli.distributed.device import choose_device, prepare_process

    device = choose_device()
    prepare_process(device)
    beside = RunFolders(Path(first["run"])).prior if isinstance(first.get("run"), str) else Path(first["png"])
    scorer = load_scorer(clip, pretrained, tokenizer, beside, device, which)
    scores: dict[str, tuple[array[int], array[float]]] = {}
    shown: list[list[dict[str, Any]]] = []

    def pools() -> Iterator[list[dict[str, Any]]]:
        several = len(manifests or []) > 1
        for pool in rerank(chain([first], lines), scorer, batch=batch_size, gather=several):
            for line in pool if write else []:
                if isinstance(line.get("store"), str) and isinstance(line.get("row"), int):
                    rows, values = scores.setdefault(line["store"], (array("q"), array("d")))
                    rows.append(max(-1, min(line["row"], 2**63 - 1)))  # no store has a row that must be clipped
                    values.append(line["score"])
            if sheet is not None and len(shown) < SHEET_CAPTIONS:
                shown.append(pool)
            yield pool

    try:
        for pool in pools() if per_prompt else [best_of_all(pools(), top)]:
            for line in pool[:top]:
                print(printed(line), flush=True)
        if sheet is not None:
            _draw_sheet(shown, sheet)
    finally:  # so that ctrl-C, or a reader that wants no more lines, loses no score
        for store, (rows, values) in scores.items():
            _write(Path(store), rows, values, scorer.name)


SHEET_CAPTIONS = 24


def _lines(manifests: list[Path]) -> Iterator[dict[str, Any]]:
    from dalle_cli.data.sample_lines import read_sample_lines
    from dalle_cli.errors import UserError
    from dalle_cli.stores.scores import sample_stores, store_lines

    if not manifests:
        # Not sys.stdin itself, which Python closes at exit while a thread may still read from it.
        with open(sys.stdin.fileno(), encoding="utf-8", closefd=False) as stream:
            yield from read_sample_lines(stream, "stdin")
    for manifest in manifests:
        if manifest.is_dir() and (stores := sample_stores(manifest)):
            for store in stores:
                yield from store_lines(store)
            continue
        try:
            with manifest.open(encoding="utf-8") as stream:
                yield from read_sample_lines(stream, str(manifest))
        except OSError as error:
            raise UserError(
                f"{manifest}: cannot be read ({error.strerror}); name a file of dalle sample's lines"
            ) from None


def _draw_sheet(shown: list[list[dict[str, Any]]], sheet: Path) -> None:
    from dalle_cli.shapes.accuracy import Pool
    from dalle_cli.stores.files import write_atomically
    from dalle_cli.views.contact_sheet import png_bytes
    from dalle_cli.views.sample_sheet import sample_sheet

    rows = [Pool(pool[0]["prompt"], tuple(pool)) for pool in shown]
    write_atomically(sheet, png_bytes(sample_sheet(rows, "Best by CLIP")))


def _write(store: Path, rows: Sequence[int], scores: Sequence[float], scorer: str) -> None:
    """Write scores into a store; only log a failure, since the lines are already printed."""
    from dalle_cli.errors import UserError
    from dalle_cli.progress import log
    from dalle_cli.stores.provenance import record_command
    from dalle_cli.stores.scores import write_scores

    try:
        write_scores(store, rows, scores, scorer)
        record_command(store.parent)
    except (UserError, OSError) as error:
        log(f"rerank: the scores were not written into the store: {error}")
