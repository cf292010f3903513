"""The study's report as one HTML file: style, plot and pictures are inside it, nothing is fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_cli.human_study.plot import COLOURS
from dalle_cli.human_study.results import PairVotes, Results
from dalle_cli.human_study.study import PICTURES, QUESTIONS, Question

SHOWN_PAIRS, SHOWN_SIZE = 24, 192
HEADINGS: dict[Question, str] = {"realistic": "more realistic", "caption": "matches the caption better"}
SHORT: dict[Question, str] = {"realistic": "more realistic", "caption": "better match"}
_STYLE = f"""
.plot svg {{ display: block; width: 100%; min-width: 720px; height: auto; }}
.pairs {{ display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }}
.pairs article {{ min-width: 0; border: 1px solid var(--rule); border-radius: 8px; padding: 12px; }}
.pairs p {{ margin: 0 0 8px; overflow-wrap: anywhere; }}
.two {{ display: grid; grid-template-columns: 1fr 1fr; gap: 8px; font-size: 13px; }}
.two img {{ display: block; width: 100%; border-radius: 4px; margin-bottom: 6px;
  box-shadow: 0 0 0 1px var(--rule); }}
.two .won {{ font-weight: 700; }}
.name {{ white-space: nowrap; }}
.number + td:not(.number), .number + th:not(.number) {{ padding-left: 24px; }}
.name::before {{ content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px;
  background: var(--dot); }}
.first {{ --dot: {COLOURS[0]}; }}
.second {{ --dot: {COLOURS[1]}; }}
"""


def page(results: Results, figures: Mapping[str, Any], plot: str, folder: Path) -> str:
    """The whole document. ``figures`` is what report.json holds, ``plot`` an SVG file's text."""
    style = files("dalle_cli.views").joinpath("templates/page.css").read_text(encoding="utf-8")
    first, second = map(escape, results.names)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{first} and {second}: human study</title>
<link rel="icon" href="data:,">
<style>
{style}{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{first} and {second}</h1><p>Human study: {figures["pairs"]} pairs, {figures["annotators_wanted"]} annotators
each, blinded</p>
<p class="result">{_result(results, figures)}</p></header>
{_majority(results, figures, plot)}
{_annotators(figures)}
{_pairs(results, folder)}
{_origin(figures)}
</main>
</body>
</html>
"""


def _result(results: Results, figures: Mapping[str, Any]) -> str:
    """What a reader takes away, for the system that more majorities found more realistic."""
    majority = figures["questions"]["realistic"]["majority"]
    winner = max(results.names, key=lambda name: majority[name]["pairs"])
    parts = []
    for question in QUESTIONS:
        share = figures["questions"][question]["majority"][winner]["share"]
        if share is not None:
            parts.append(f"{HEADINGS[question]} in {_interval(share)} of the pairs")
    return (
        f"By majority vote, <strong>{escape(winner)}</strong> is {' and '.join(parts)}."
        if parts
        else "No majority yet."
    )


def _majority(results: Results, figures: Mapping[str, Any], plot: str) -> str:
    rows = []
    for question in QUESTIONS:
        found = figures["questions"][question]
        for place, name in enumerate(results.names):
            entry, share = found["majority"][name], found["majority"][name]["share"]
            rows.append(
                [
                    escape(HEADINGS[question]) if place == 0 else "",
                    _name(name, place),
                    f"{entry['pairs']} of {found['decided']}",
                    "–" if share is None else f"<strong>{100 * share['value']:.1f}&nbsp;%</strong>",
                    "–" if share is None else f"{100 * share['low']:.1f} – {100 * share['high']:.1f}",
                    f"{found['votes'][name]:,}",
                    _p_value(found["p_value"]) if place == 0 else "",
                    _decimal(found["fleiss_kappa"]) if place == 0 else "",
                    _decimal(found["agreement"]) if place == 0 else "",
                ]
            )
    header = ["question", "system", "pairs won", "share", "95 % interval", "votes", "p", "Fleiss’ κ", "agreement"]
    notes = [f'<p class="warning">{escape(text)}</p>' for text in figures["warnings"]]
    return _section(
        "Majority vote",
        f'<div class="wide plot">{plot[plot.index("<svg") :]}</div>',
        _table(header, rows, numbers=range(2, 9)),
        '<p class="note">A pair is won by the system that most of its annotators chose; pairs split evenly count for '
        "neither. Intervals are Wilson's, over pairs. p: two-sided sign test over pairs, of no preference. Fleiss' "
        "kappa counts votes for systems; it falls when one system wins nearly always, even if annotators agree, so the "
        "mean agreement of two annotators, which it corrects for chance, stands beside it.</p>",
        *notes,
    )


def _annotators(figures: Mapping[str, Any]) -> str:
    rows = [
        [
            entry["label"],
            f"{entry['votes']:,}",
            f"{entry['checks_answered']}",
            f"{entry['checks_wrong']}",
            '<span class="mismatch">excluded</span>' if entry["excluded"] else "counted",
        ]
        for entry in figures["annotators"]
    ]
    return _section(
        "Annotators and attention checks",
        f'<p class="note">{escape(figures["exclusion_rule"])} A check shows one of the pictures beside uniform noise; '
        "both questions are asked of it. Votes on checks count for no system.</p>",
        _table(["annotator", "answers", "check answers", "of them wrong", "votes"], rows, numbers=(1, 2, 3)),
    )


def _pairs(results: Results, folder: Path) -> str:
    by_question = {question: {pair.item.id: pair for pair in results.of(question)} for question in QUESTIONS}
    order = [results.study.by_id[name] for name in results.key.items]
    cards = []
    for item in order[:SHOWN_PAIRS]:
        names = {results.key.items[item.id].left: item.left, results.key.items[item.id].right: item.right}
        votes = [by_question[question][item.id] for question in QUESTIONS]
        columns = [
            f'<div><img alt="{escape(name)}" src="{_thumbnail(folder / PICTURES / names[name])}">'
            f"{_name(name, place)}{''.join(_votes(pair, place) for pair in votes)}</div>"
            for place, name in enumerate(results.names)
        ]
        cards.append(f'<article><p>{escape(item.caption)}</p><div class="two">{"".join(columns)}</div></article>')
    shown = (
        f"The first {len(cards)} of {len(order)} pairs in the captions' order"
        if len(cards) < len(order)
        else "All pairs"
    )
    return _section(
        "Pairs",
        f'<p class="note">{shown}, whether they came out well or not; pairs.csv has the votes of all.</p>',
        f'<div class="pairs">{"".join(cards)}</div>',
    )


def _votes(pair: PairVotes, place: int) -> str:
    won = ' class="won"' if pair.winner == place else ""
    return f"<div{won}>{SHORT[pair.question]}: {pair.votes[place]}</div>"


def _origin(figures: Mapping[str, Any]) -> str:
    rows = [
        [_name(name, place), f"<code>{escape(spec)}</code>"]
        for place, (name, spec) in enumerate(figures["systems"].items())
    ]
    rows.append(["captions", f"<code>{escape(figures['captions'])}</code>"])
    if figures["captions_left_out"]:
        rows.append(["captions without pictures", f"{figures['captions_left_out']}, left out"])
    rows += [["seed", str(figures["seed"])], ["study", f"<code>{figures['study'][:16]}</code>"]]
    return _section("Made from", _table(["", ""], rows))


def _thumbnail(path: Path) -> str:
    with Image.open(path) as picture:
        picture.thumbnail((SHOWN_SIZE, SHOWN_SIZE))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _name(name: str, place: int) -> str:
    return f'<span class="name {("first", "second")[place]}">{escape(name)}</span>'


def _interval(share: Mapping[str, float]) -> str:
    value, low, high = (f"{100 * share[part]:.1f}" for part in ("value", "low", "high"))
    return f"<strong>{value}&nbsp;%</strong> (95&nbsp;% interval {low}&nbsp;–&nbsp;{high})"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Cells are HTML already; columns in ``numbers`` stand to the right."""
    kind = dict.fromkeys(numbers, ' class="number"')
    head = "".join(f"<th{kind.get(i, '')}>{escape(name)}</th>" for i, name in enumerate(header))
    lines = [
        "<tr>" + "".join(f"<td{kind.get(i, '')}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    ]
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'
