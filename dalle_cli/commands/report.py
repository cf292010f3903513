"""``dalle report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.commands.options import DataOption, RecipeArgument, SetOption, folders, read_recipe

if TYPE_CHECKING:
    from dalle_cli.report.figures import ReportFigures
    from dalle_cli.shapes.accuracy import Share


def command(
    recipe: RecipeArgument,
    data: DataOption = None,
    ranked: Annotated[Path | None, typer.Option(help="Output of dalle rerank, all samples of each caption.")] = None,
    fid: Annotated[list[Path] | None, typer.Option(help="JSON file of dalle eval-fid --out; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder of the report. [RUN]")] = None,
    set_: SetOption = None,
) -> None:
    """Write a run's report: one HTML file that opens from disk, its figures as JSON, and a contact sheet.

    The report names the stages that have not run. For captions of the built-in shapes world, it measures whether
    samples show what their captions say.

    Example: [bold]dalle report recipes/quickstart.yaml --ranked runs/quickstart/ranked.jsonl[/bold]
    """
    settings = read_recipe(recipe, set_, data)

    from dalle_cli.report.report import write_report

    report = write_report(settings, ranked, fid or [], out or folders(settings).root)
    _print_summary(report.figures)
    typer.echo(report.html)


def _print_summary(figures: ReportFigures) -> None:
    """Print the main figures on stderr."""
    from rich.console import Console

    from dalle_cli.views.tables import grid_table, pairs_table, print_tables

    tables = []
    if figures.oracle is not None:
        groups = figures.oracle.groups
        rows = [(n, g.prompts, _percent(g.single), _percent(g.best), _percent(g.any_right)) for n, g in groups.items()]
        pool_size = next(iter(groups.values())).pool_size
        columns = ["", "captions", "single sample", f"best of {pool_size} by CLIP", f"any of {pool_size}"]
        tables.append(grid_table("Captions drawn right", columns, rows, right=range(1, 5)))
    lines = [("result", figures.result)]
    lines += [("note", text) for text in (figures.oracle.warnings if figures.oracle is not None else [])]
    lines += [(stage.name, f"update {stage.step:,} of {stage.updates:,}") for stage in figures.stages.values()]
    if (found := figures.reconstructions) is not None:
        lines.append(("reconstructions", f"PSNR {found.psnr_mean:.1f} dB, SSIM {found.ssim_mean:.3f}"))
    if (codebook := figures.codebook) is not None:
        lines.append(("codebook", f"perplexity {codebook.perplexity:.1f} of {codebook.codes}"))
    lines += [(f"FID on {fid.evaluation.features.split()[0]}", f"{fid.system.fid:.2f}") for fid in figures.fid]
    lines += [("missing", text) for text in figures.missing]
    tables.append(pairs_table(f"Report of {figures.name}", lines))
    print_tables(Console(stderr=True), tables)


def _percent(share: Share | None) -> str:
    return "" if share is None else f"{100 * share.value:.1f} ± {100 * share.error:.1f} %"
