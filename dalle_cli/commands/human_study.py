"""``dalle human-study``: make, serve and report a blinded comparison of two systems by people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.commands.options import named_systems

if TYPE_CHECKING:
    from dalle_cli.human_study.results import StudyFigures

app = typer.Typer(
    help="Compare two systems' pictures by human votes: a blinded study, its web page and its results.\n\n"
    "Example: [bold]dalle human-study make runs/quickstart/study --system single=runs/quickstart/samples.jsonl "
    "--system best=runs/quickstart/ranked.jsonl --captions runs/quickstart/samples.jsonl[/bold]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
MOST = 10_000
"""Largest number of annotators, and of attention checks."""
StudyArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The study's folder, written by make.")]


@app.command(no_args_is_help=True)
def make(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder of the study.")],
    system: Annotated[
        list[str],
        typer.Option(metavar="NAME=PICTURES", help="Folder named by caption ids, or lines of dalle rerank; give two."),
    ],
    captions: Annotated[Path, typer.Option(metavar="FILE", help="Text, one a line; .jsonl; or COCO's .json.")],
    annotators: Annotated[int, typer.Option(min=1, max=MOST, help="Votes on each question of each pair.")] = 5,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Captions drawn by the seed, all if left out.", show_default=False)
    ] = None,
    checks: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST, help="Attention checks; by default one per ten pairs, at least 4.", show_default=False
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Side of the cropped and resized pictures, in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Decides sides, checks and names.")] = 0,
) -> None:
    """Make a study: each caption's two pictures on random sides, under random names.

    A folder's pictures are named by caption ids: the line number in a text file, "id" in a .jsonl file, the
    annotation's id in COCO's file. Lines of dalle sample or rerank are matched by prompt; of several lines for one
    prompt, the one of rank 1 is taken, or else the first. Attention checks show a picture beside noise.

    Example: [bold]dalle human-study make runs/quickstart/study --system single=runs/quickstart/samples.jsonl --system
    best=runs/quickstart/ranked.jsonl --captions runs/quickstart/samples.jsonl[/bold]
    """
    from dalle_cli.human_study.make import StudyRequest, make_study

    systems = named_systems(system, "NAME=PICTURES", "ours=best.jsonl")
    make_study(StudyRequest(systems, captions, annotators, pairs, checks, size, seed), out)
    typer.echo(out)


@app.command(no_args_is_help=True)
def serve(
    out: StudyArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 admits phones on the same network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    links: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST, help="Number of annotators, as many as votes wanted if left out.", show_default=False
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name that browsers may ask for, as study.example.org of a proxy.", show_default=False
        ),
    ] = None,
) -> None:
    """Serve a study as a web page until ctrl-C; every vote is on disk before it is acknowledged.

    It prints a line for each annotator: a name, a tab and the link to send. Whoever opens a link votes as that
    annotator, on any device. The server can be stopped and started again at any time; links stay the same.

    Example: [bold]dalle human-study serve runs/quickstart/study --port 8000[/bold]
    """
    from dalle_cli.human_study.server import EVERY_ADDRESS, StudyServer
    from dalle_cli.progress import log

    with StudyServer(out, host, port, name or (), links) as server:
        for annotator in server.annotators:
            print(f"{annotator.name}\t{server.link(annotator)}", flush=True)
        if host == EVERY_ADDRESS:
            log("where a device does not know this machine's name, replace it in the link by the IP address")
        log("ctrl-C stops the server; every vote is kept")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log("stopped; run the same command again to resume")


@app.command(no_args_is_help=True)
def report(
    out: StudyArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report the votes: majority shares with 95% intervals, Fleiss' kappa, attention checks, plot and page.

    Writes report.html, report.json, pairs.csv, votes.csv, votes.png and votes.svg into OUT/report, also while the study
    is served.

    Example: [bold]dalle human-study report runs/quickstart/study[/bold]
    """
    from dataclasses import asdict

    from dalle_cli.human_study.report import write_report
    from dalle_cli.progress import printable_json

    figures, page = write_report(out)
    if as_json:
        typer.echo(printable_json(asdict(figures), indent=2))
        return
    _print(figures)
    typer.echo(page)


def _print(figures: StudyFigures) -> None:
    """Print the majorities and the warnings on stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dalle_cli.progress import printable

    console = Console(stderr=True)
    table = Table(title="Majority vote", title_justify="left", box=None, pad_edge=False)
    for column in ("question", "system", "pairs won", "share", "95% interval", "Fleiss' kappa"):
        table.add_column(column, justify="left" if column in ("question", "system") else "right")
    for found in figures.questions.values():
        for place, (name, entry) in enumerate(found.majority.items()):
            share, kappa = entry.share, found.fleiss_kappa
            table.add_row(
                found.wording if place == 0 else "",
                Text(printable(name)),
                f"{entry.pairs} of {found.decided}",
                "" if share is None else f"{100 * share.value:.1f}%",
                "" if share is None else f"{100 * share.low:.1f} - {100 * share.high:.1f}",
                "" if kappa is None or place else f"{kappa:.3f}",
            )
    console.print(table)
    for warning in figures.warnings:
        console.print(Text(f"note: {printable(warning)}"))
