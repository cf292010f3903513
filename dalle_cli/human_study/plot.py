"""Bar plot of a study: majority votes for each system, and the number of annotators who chose each."""

from __future__ import annotations

import io
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.figure import Figure

from dalle_cli.human_study.results import QuestionFigures, StudyFigures
from dalle_cli.human_study.study import QUESTIONS, Question
from dalle_cli.views.plots import BLUE, ORANGE, STYLE, label_of

COLOURS = (BLUE, ORANGE)
TITLES: dict[Question, str] = {"realistic": "more realistic", "caption": "matches the\ncaption better"}
WIDTH = 0.38
_STYLE: Any = {
    **STYLE,
    "axes.titlesize": 9,
    "axes.titlecolor": "#4b5160",
    "axes.grid.axis": "y",
    "legend.fontsize": "medium",
    "svg.fonttype": "path",
    "svg.hashsalt": "dalle human-study",
}


def draw(figures: StudyFigures, kind: Literal["png", "svg"]) -> bytes:
    """Draw the shares of pairs won, with Wilson intervals, and for each question the complete pairs by vote count."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.1))
        majority, *counts = figure.subplots(1, 3, width_ratios=(1.25, 1, 1), sharey=True)
        _majority(majority, figures)
        for axes, question in zip(counts, QUESTIONS, strict=True):
            axes.set_title(TITLES[question].replace("\n", " "))
            _by_votes(axes, figures.questions[question], figures.annotators_wanted)
        majority.set_ylim(0, 109)
        majority.set_yticks(range(0, 101, 25))
        majority.set_ylabel("pairs, %")
        figure.legend(*majority.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=1)
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",))
        figure.savefig(buffer, format=kind, metadata=metadata)
        return buffer.getvalue()


def _majority(axes: Any, figures: StudyFigures) -> None:
    axes.set_title("majority vote")
    for place, (name, colour) in enumerate(zip(figures.systems, COLOURS, strict=True)):
        for x, question in enumerate(QUESTIONS):
            share = figures.questions[question].majority[name].share
            at = x + (place - 0.5) * WIDTH
            if share is None:
                axes.bar(at, 0, color=colour, label=label_of(name) if x == 0 else None)
                continue
            value, low, high = (100 * part for part in (share.value, share.low, share.high))
            axes.bar(at, value, WIDTH * 0.94, color=colour, label=label_of(name) if x == 0 else None)
            axes.errorbar(at, value, yerr=[[value - low], [high - value]], color="#3a3f4b", elinewidth=1, capsize=2.5)
            axes.annotate(f"{value:.1f}", (at, high), xytext=(0, 2), ha="center", textcoords="offset points")
    axes.set_xticks(range(len(QUESTIONS)), [TITLES[question] for question in QUESTIONS])
    axes.set_xlim(-0.6, len(QUESTIONS) - 0.4)


def _by_votes(axes: Any, figures: QuestionFigures, wanted: int) -> None:
    pairs = 0
    for place, (counts, colour) in enumerate(zip(figures.pairs_by_votes.values(), COLOURS, strict=True)):
        pairs = sum(counts)
        for votes, count in enumerate(counts):
            axes.bar(votes + (place - 0.5) * WIDTH, 100 * count / max(pairs, 1), WIDTH * 0.94, color=colour)
    axes.set_xticks(range(wanted + 1), [f"{votes}/{wanted}" for votes in range(wanted + 1)])
    axes.set_xlabel("annotators who chose it" if pairs else "no pair has all its votes yet")
