"""From votes and key to figures: who is excluded, each pair's votes for each system, majorities and agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dalle_cli.human_study.agreement import CONFIDENCE, fleiss_kappa, sign_test, wilson
from dalle_cli.human_study.study import (
    QUESTIONS,
    SIDES,
    WORDING,
    WRONG_SHARE_PERCENT,
    Item,
    Key,
    Question,
    Side,
    Study,
)
from dalle_cli.human_study.votes import Vote

FEW_PAIRS = 30


@dataclass(frozen=True)
class Annotator:
    """One annotator's part. ``label`` stands for the name, which no report shows."""

    name: str
    label: str
    votes: int
    checks_answered: int
    checks_wrong: int
    excluded: bool


@dataclass(frozen=True)
class PairVotes:
    """Votes that count on one question of one pair, by system in the key's order."""

    item: Item
    question: Question
    votes: tuple[int, int]

    @property
    def winner(self) -> int | None:
        """The system most annotators chose; None where they are split evenly or none voted."""
        first, second = self.votes
        return None if first == second else int(second > first)


@dataclass(frozen=True)
class Results:
    """A study's outcome."""

    study: Study
    key: Key
    annotators: Sequence[Annotator]
    pairs: Sequence[PairVotes]

    @property
    def names(self) -> tuple[str, str]:
        first, second = self.key.systems
        return first, second

    def of(self, question: Question) -> list[PairVotes]:
        """Every pair's votes on the question, in the order of the study's items."""
        return [pair for pair in self.pairs if pair.question == question]


def count_votes(study: Study, key: Key, votes: Sequence[Vote]) -> Results:
    """The votes of annotators who did not fail, by pair, question and system."""
    annotators = _annotators(study, votes)
    excluded = {annotator.name for annotator in annotators if annotator.excluded}
    kept = Counter((vote.item, vote.question, vote.answer) for vote in votes if vote.annotator not in excluded)
    names = list(key.systems)
    pairs = []
    for question in QUESTIONS:
        for item in study.pairs:
            by_system = [0, 0]
            for side in SIDES:
                by_system[names.index(system_on(key, item, side))] += kept[item.id, question, side]
            pairs.append(PairVotes(item, question, (by_system[0], by_system[1])))
    return Results(study, key, annotators, pairs)


def system_on(key: Key, item: Item, side: Side) -> str:
    """Whose picture is on a side of a pair."""
    return key.items[item.id].left if side == "left" else key.items[item.id].right


def figures(results: Results) -> dict[str, Any]:
    """What report.json holds."""
    study, key = results.study, results.key
    questions = {question: _question(results, question) for question in QUESTIONS}
    rule = (
        f"An annotator is excluded who answers more than {WRONG_SHARE_PERCENT}% of all the study's check questions "
        f"wrongly: more than {study.wrong_allowed} of {len(study.checks) * len(QUESTIONS)}."
        if study.checks
        else "The study has no attention checks; nobody is excluded."
    )
    return {
        "format": "dalle-human-study-report",
        "version": 1,
        "study": study.sha256,
        "systems": key.systems,
        "captions": key.captions,
        "captions_left_out": key.captions_left_out,
        "seed": key.seed,
        "pairs": len(study.pairs),
        "checks": len(study.checks),
        "annotators_wanted": study.annotators,
        "confidence": CONFIDENCE,
        "exclusion_rule": rule,
        "questions": questions,
        "annotators": [
            {name: value for name, value in asdict(annotator).items() if name != "name"}
            for annotator in results.annotators
        ],
        "warnings": _warnings(results, questions),
    }


def _annotators(study: Study, votes: Sequence[Vote]) -> list[Annotator]:
    """In the order of their first votes."""
    total: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for vote in votes:
        total[vote.annotator] += 1
        right_answer = study.by_id[vote.item].check
        if right_answer is not None:
            answered[vote.annotator] += 1
            wrong[vote.annotator] += vote.answer != right_answer
    return [
        Annotator(name, f"A{place}", count, answered[name], wrong[name], wrong[name] > study.wrong_allowed)
        for place, (name, count) in enumerate(total.items(), start=1)
    ]


def _question(results: Results, question: Question) -> dict[str, Any]:
    pairs, names, wanted = results.of(question), results.names, results.study.annotators
    winners = [pair.winner for pair in pairs]
    voted = [sum(pair.votes) for pair in pairs]
    decided = len(pairs) - winners.count(None)
    shares = [wilson(winners.count(place), decided) for place in (0, 1)]
    agreement = fleiss_kappa(np.array([pair.votes for pair in pairs], dtype=np.int64).reshape(-1, 2))
    return {
        "wording": WORDING[question],
        "majority": {
            name: {"pairs": winners.count(place), "share": None if share is None else asdict(share)}
            for place, (name, share) in enumerate(zip(names, shares, strict=True))
        },
        "decided": decided,
        "ties": sum(winner is None and votes > 0 for winner, votes in zip(winners, voted, strict=True)),
        "without_votes": voted.count(0),
        "with_all_votes": sum(votes >= wanted for votes in voted),
        "p_value": sign_test(winners.count(0), decided),
        "votes": {name: sum(pair.votes[place] for pair in pairs) for place, name in enumerate(names)},
        "pairs_by_votes": {
            name: [
                sum(sum(p.votes) == wanted and p.votes[place] == votes for p in pairs) for votes in range(wanted + 1)
            ]
            for place, name in enumerate(names)
        },
        "fleiss_kappa": None if agreement is None else agreement.kappa,
        "agreement": None if agreement is None else agreement.observed,
        "pairs_in_kappa": sum(votes >= 2 for votes in voted),
    }


def _warnings(results: Results, questions: dict[Question, dict[str, Any]]) -> list[str]:
    found = []
    pairs, wanted = len(results.study.pairs), results.study.annotators
    for question, figure in questions.items():
        if lacking := pairs - figure["with_all_votes"]:
            found.append(
                f"{question}: {lacking} of {pairs} pairs have fewer than the {wanted} votes wanted; serve the study to "
                "more annotators, who are asked for these alone"
            )
        if figure["ties"]:
            found.append(f"{question}: {figure['ties']} pairs are split evenly and count for neither system")
    if pairs < FEW_PAIRS:
        found.append(f"{pairs} pairs are few: the intervals are wide, and hold for these captions alone")
    excluded = [annotator.label for annotator in results.annotators if annotator.excluded]
    if excluded:
        found.append(f"excluded by the attention checks: {', '.join(excluded)}")
    if not results.study.checks:
        found.append("the study has no attention checks: votes given without looking count like the others")
    return found
