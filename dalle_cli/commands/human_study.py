"""``dalle human-study``: make, serve and report a blinded comparison of two systems by people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dalle_cli.commands.options import named_systems

app = typer.Typer(
    help="Compare two systems' pictures by people's votes: a blinded study, its web page, its figures.\n\n"
    'Example: [bold]dalle human-study make study --system gan=dm-gan --system "ours=best.jsonl" --captions captions.txt'
    "[/bold]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
StudyArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The study's folder, that make wrote.")]


@app.command(no_args_is_help=True)
def make(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    system: Annotated[
        list[str],
        typer.Option(metavar="NAME=PICTURES", help="Folder named by caption ids, or lines of dalle rerank; give two."),
    ],
    captions: Annotated[Path, typer.Option(metavar="FILE", help="Text, one a line; .jsonl; or COCO's .json.")],
    annotators: Annotated[int, typer.Option(min=1, help="Votes on each question of each pair.")] = 5,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Captions drawn by the seed, all if left out.", show_default=False)
    ] = None,
    checks: Annotated[
        int | None,
        typer.Option(min=0, help="Attention checks; if left out one in ten pairs, at least 4.", show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures shown, cropped and resized alike.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Decides sides, checks and names.")] = 0,
) -> None:
    """Make a study: each caption's two pictures on random sides, under names that say nothing.

    A picture belongs to a caption by its file's name, the id of the caption: the number of its line in a text file,
    "id" in a .jsonl file, the annotation's id in COCO's. Lines of dalle sample or rerank belong by their prompts; of
    several for one prompt the one of rank 1 is taken, or else the first. Attention checks show a picture beside noise.

    Example: [bold]dalle human-study make study --system gan=dm-gan --system ours=best.jsonl --captions captions.txt
    [/bold]
    """
    from dalle_cli.human_study.make import StudyRequest, make_study

    systems = named_systems(system, "NAME=PICTURES", "ours=best.jsonl")
    make_study(StudyRequest(systems, captions, annotators, pairs, checks, size, seed), out)
    typer.echo(out)


@app.command(no_args_is_help=True)
def serve(
    out: StudyArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets phones in the same network in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
) -> None:
    """Serve a study as a web page until ctrl-C; every vote is on the disk before it is acknowledged.

    It can be stopped and started at any time. Each annotator enters a name once, and is asked what still lacks votes.

    Example: [bold]dalle human-study serve study --port 8000[/bold]
    """
    import socket

    from dalle_cli.human_study.server import StudyServer
    from dalle_cli.progress import log

    with StudyServer(out, host, port) as server:
        print(server.address, flush=True)
        if host == "0.0.0.0":
            log(f"on other devices: http://{socket.gethostname()}:{server.server_port}/, or this machine's address")
        log("ctrl-C stops it; every vote is kept")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log("stopped; start it again to go on")


@app.command(no_args_is_help=True)
def report(
    out: StudyArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Report the votes: majority shares with 95% intervals, Fleiss' kappa, attention checks, plot and page.

    Writes OUT/report: report.html, report.json, pairs.csv, votes.csv, votes.png and votes.svg. May run while the
    study is served.

    Example: [bold]dalle human-study report study[/bold]
    """
    import json

    from dalle_cli.human_study.report import write_report

    figures, page = write_report(out)
    if as_json:
        typer.echo(json.dumps(figures, indent=2, ensure_ascii=False))
        return
    _print(figures)
    typer.echo(page)


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True)
    table = Table(title="Majority vote", title_justify="left", box=None, pad_edge=False)
    for column in ("question", "system", "pairs won", "share", "95% interval", "Fleiss' kappa"):
        table.add_column(column, justify="left" if column in ("question", "system") else "right")
    for found in figures["questions"].values():
        for place, (name, entry) in enumerate(found["majority"].items()):
            share, kappa = entry["share"], found["fleiss_kappa"]
            table.add_row(
                found["wording"] if place == 0 else "",
                Text(name),
                f"{entry['pairs']} of {found['decided']}",
                "" if share is None else f"{100 * share['value']:.1f}%",
                "" if share is None else f"{100 * share['low']:.1f} - {100 * share['high']:.1f}",
                "" if kappa is None or place else f"{kappa:.3f}",
            )
    console.print(table)
    for warning in figures["warnings"]:
        console.print(Text(f"note: {warning}"))
