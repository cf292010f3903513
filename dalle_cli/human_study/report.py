"""Write a study's report: figures, tables, plot and one HTML page in ``report/`` of the study's folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from dalle_cli.data.images import read_picture
from dalle_cli.errors import UserError
from dalle_cli.human_study.plot import COLOURS, draw
from dalle_cli.human_study.results import PairVotes, Results, StudyFigures, count_votes, study_figures, system_on
from dalle_cli.human_study.study import PICTURES, QUESTIONS, VOTES, load_key, load_study
from dalle_cli.human_study.votes import Vote, Votes
from dalle_cli.stores.files import csv_text, write_atomically
from dalle_cli.views.html import render

REPORT = "report"
SHOWN_PAIRS, THUMBNAIL_SIDE = 24, 192


@dataclass(frozen=True)
class _Picture:
    """Picture of one system in a pair, for the page."""

    uri: str
    votes: list[tuple[PairVotes, int]]
    """Votes on each question, and the number of votes for this system."""


def write_report(folder: Path) -> tuple[StudyFigures, Path]:
    """Write the report of the votes so far, also while the study is served; return the figures and the page's path.

    Writes report.html, report.json, pairs.csv (each pair's votes), votes.csv (every vote, unblinded) and the plot as
    votes.png and votes.svg. They number the annotators; names stay in the database of votes.

    Raises:
        UserError: ``folder`` holds no complete study, or nobody has voted.
    """
    study = load_study(folder)
    key = load_key(folder, study)
    nobody = f"{folder}: nobody has voted yet; start dalle human-study serve {folder}"
    if not (folder / VOTES).is_file():
        raise UserError(nobody)
    with Votes(folder, study) as store:
        votes = store.all()
    if not votes:
        raise UserError(nobody)
    results = count_votes(study, key, votes)
    figures, out = study_figures(results), folder / REPORT
    svg = draw(figures, "svg")
    write_atomically(out / "votes.svg", svg)
    write_atomically(out / "votes.png", draw(figures, "png"))
    write_atomically(out / "report.json", json.dumps(asdict(figures), indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / "pairs.csv", csv_text(_pair_rows(results)))
    write_atomically(out / "votes.csv", csv_text(_vote_rows(results, votes)))
    write_atomically(out / "report.html", _page(results, figures, svg.decode(), folder / PICTURES))
    return figures, out / "report.html"


def _pair_rows(results: Results) -> Iterable[Sequence[object]]:
    first, second = results.names
    yield "item", "caption_id", "caption", "question", f"votes {first}", f"votes {second}", "neither", "majority"
    for pair in results.pairs:
        winner = "" if pair.winner is None else results.names[pair.winner]
        caption_id = results.key.items[pair.item.id].caption_id
        yield pair.item.id, caption_id, pair.item.caption, pair.question, *pair.votes, pair.neither, winner


def _vote_rows(results: Results, votes: Sequence[Vote]) -> Iterable[Sequence[object]]:
    yield "annotator", "excluded", "at", "item", "question", "side", "system", "check"
    for vote in votes:
        item, annotator = results.study.by_id[vote.item], results.annotators[vote.annotator]
        system = check = ""
        if item.check is not None:
            check = "right" if vote.answer == item.check else "neither" if vote.answer == "neither" else "wrong"
        elif vote.answer != "neither":
            system = system_on(results.key, item, vote.answer)
        excluded = int(annotator.excluded)
        yield annotator.label, excluded, vote.at, item.id, vote.question, vote.answer, system, check


def _page(results: Results, figures: StudyFigures, plot: str, pictures: Path) -> str:
    """Return the report as one HTML page; ``plot`` is an SVG file's text."""
    majority = figures.questions["realistic"].majority
    winner = max(results.names, key=lambda name: majority[name].pairs)
    shares = {question: figures.questions[question].majority[winner].share for question in QUESTIONS}
    votes = {(pair.item.id, pair.question): pair for pair in results.pairs}
    pairs = []
    for name in list(results.key.items)[:SHOWN_PAIRS]:
        item, entry = results.study.by_id[name], results.key.items[name]
        files = {entry.left: item.left, entry.right: item.right}
        shown = [
            _Picture(
                _thumbnail(pictures / files[system]),
                [(votes[name, question], votes[name, question].votes[place]) for question in QUESTIONS],
            )
            for place, system in enumerate(results.names)
        ]
        pairs.append((item.caption, shown))
    return render(
        "human_study.html",
        figures=figures,
        names=results.names,
        winner=winner,
        shares={question: share for question, share in shares.items() if share is not None},
        plot=plot[plot.index("<svg") :],
        pairs=pairs,
        colours=COLOURS,
    )


def _thumbnail(path: Path) -> str:
    """Return the picture's thumbnail as a JPEG data URI."""
    picture = Image.fromarray(read_picture(path, "make the study anew"))
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
