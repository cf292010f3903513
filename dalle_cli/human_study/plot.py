"""The study's bar plot, as in the talk: majority votes for each system, and how many annotators chose each."""

from __future__ import annotations

import io
from typing import Any, Literal

import matplotlib.pyplot as plt

from dalle_cli.human_study.agreement import wilson
from dalle_cli.human_study.results import Results
from dalle_cli.human_study.study import QUESTIONS, Question
from dalle_cli.views.plots import BLUE, ORANGE, STYLE

COLOURS = (BLUE, ORANGE)
SHORT: dict[Question, str] = {"realistic": "more realistic", "caption": "matches the\ncaption better"}
WIDTH = 0.38
_STYLE = {
    **STYLE,
    "axes.titlesize": 9,
    "axes.titlecolor": "#4b5160",
    "axes.grid.axis": "y",
    "legend.fontsize": "medium",
    "svg.fonttype": "path",
    "svg.hashsalt": "dalle human-study",
}


def draw(results: Results, kind: Literal["png", "svg"]) -> bytes:
    """Left, the shares of pairs by majority vote with Wilson intervals; right, for each question, the shares of pairs
    with 0, 1, ... votes for each system, of the pairs that have all their votes.
    """
    with plt.rc_context(_STYLE):
        figure, (majority, *counts) = plt.subplots(1, 3, figsize=(9.6, 3.1), width_ratios=(1.25, 1, 1), sharey=True)
        _majority(majority, results)
        for axes, question in zip(counts, QUESTIONS, strict=True):
            _by_votes(axes, results, question)
        majority.set_ylim(0, 109)
        majority.set_yticks(range(0, 101, 25))
        majority.set_ylabel("pairs, %")
        figure.legend(*majority.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=1)
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",))
        figure.savefig(buffer, format=kind, metadata=metadata)
        plt.close(figure)
        return buffer.getvalue()


def _majority(axes: Any, results: Results) -> None:
    axes.set_title("majority vote")
    for place, (name, colour) in enumerate(zip(results.names, COLOURS, strict=True)):
        for x, question in enumerate(QUESTIONS):
            winners = [pair.winner for pair in results.of(question)]
            share = wilson(winners.count(place), len(winners) - winners.count(None))
            at = x + (place - 0.5) * WIDTH
            if share is None:
                axes.bar(at, 0, color=colour, label=name if x == 0 else None)
                continue
            value, low, high = (100 * part for part in (share.value, share.low, share.high))
            axes.bar(at, value, WIDTH * 0.94, color=colour, label=name if x == 0 else None)
            axes.errorbar(at, value, yerr=[[value - low], [high - value]], color="#3a3f4b", elinewidth=1, capsize=2.5)
            axes.annotate(f"{value:.1f}", (at, high), xytext=(0, 2), ha="center", textcoords="offset points")
    axes.set_xticks(range(len(QUESTIONS)), [SHORT[question] for question in QUESTIONS])
    axes.set_xlim(-0.6, len(QUESTIONS) - 0.4)


def _by_votes(axes: Any, results: Results, question: Question) -> None:
    axes.set_title(SHORT[question].replace("\n", " "))
    wanted = results.study.annotators
    pairs = [pair for pair in results.of(question) if sum(pair.votes) == wanted]
    for place, colour in enumerate(COLOURS):
        for votes in range(wanted + 1):
            count = sum(pair.votes[place] == votes for pair in pairs)
            axes.bar(votes + (place - 0.5) * WIDTH, 100 * count / max(len(pairs), 1), WIDTH * 0.94, color=colour)
    axes.set_xticks(range(wanted + 1), [f"{votes}/{wanted}" for votes in range(wanted + 1)])
    axes.set_xlabel("annotators who chose it" if pairs else "no pair has all its votes yet")
