"""A study's report: figures, tables, plot and one HTML page in ``report/`` of the study's folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dalle_cli.errors import UserError
from dalle_cli.human_study.plot import draw
from dalle_cli.human_study.report_page import page
from dalle_cli.human_study.results import Results, count_votes, figures, system_on
from dalle_cli.human_study.study import VOTES, load_key, load_study
from dalle_cli.human_study.votes import Vote, Votes
from dalle_cli.stores.files import write_atomically

REPORT = "report"


def write_report(folder: Path) -> tuple[dict[str, Any], Path]:
    """The figures and the HTML page's path. May run while the study is served.

    Writes report.html, report.json, pairs.csv (each pair's votes), votes.csv (every vote, unblinded) and the plot as
    votes.png and votes.svg. Annotators are numbered there; their names stay in the votes' database.

    Raises:
        UserError: ``folder`` holds no whole study, or nobody has voted.
    """
    study = load_study(folder)
    key = load_key(folder, study)
    if not (folder / VOTES).is_file():
        raise UserError(f"{folder}: nobody has voted yet; start dalle human-study serve {folder}")
    with Votes(folder, study) as store:
        votes = store.all()
    if not votes:
        raise UserError(f"{folder}: nobody has voted yet; start dalle human-study serve {folder}")
    results = count_votes(study, key, votes)
    found, out = figures(results), folder / REPORT
    svg = draw(results, "svg")
    write_atomically(out / "votes.svg", svg)
    write_atomically(out / "votes.png", draw(results, "png"))
    write_atomically(out / "report.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / "pairs.csv", _csv(_pair_rows(results)))
    write_atomically(out / "votes.csv", _csv(_vote_rows(results, votes)))
    write_atomically(out / "report.html", page(results, found, svg.decode(), folder))
    return found, out / "report.html"


def _pair_rows(results: Results) -> Iterable[Sequence[object]]:
    first, second = results.names
    yield "item", "caption_id", "caption", "question", f"votes {first}", f"votes {second}", "majority"
    for pair in results.pairs:
        winner = "" if pair.winner is None else results.names[pair.winner]
        caption_id = results.key.items[pair.item.id].caption_id
        yield pair.item.id, caption_id, pair.item.caption, pair.question, *pair.votes, winner


def _vote_rows(results: Results, votes: Sequence[Vote]) -> Iterable[Sequence[object]]:
    by_name = {annotator.name: annotator for annotator in results.annotators}
    yield "annotator", "excluded", "at", "item", "question", "side", "system", "check"
    for vote in votes:
        item, annotator = results.study.by_id[vote.item], by_name[vote.annotator]
        if item.check is None:
            judged = system_on(results.key, item, vote.answer), ""
        else:
            judged = "", "right" if vote.answer == item.check else "wrong"
        yield annotator.label, int(annotator.excluded), vote.at, item.id, vote.question, vote.answer, *judged


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
