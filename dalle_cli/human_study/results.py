"""Results of a study: excluded annotators, each pair's votes, majorities and agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dalle_cli.human_study.statistics import CONFIDENCE, Share, fleiss_kappa, sign_test, wilson
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
"""Number of pairs below which the report warns about wide intervals."""


@dataclass(frozen=True)
class AnnotatorFigures:
    """Counts of one annotator's votes; ``label`` replaces the name, which no report shows."""

    label: str
    votes: int
    checks_answered: int
    checks_wrong: int
    excluded: bool


@dataclass(frozen=True)
class PairVotes:
    """Number of counted votes on one question about one pair, for each system in the key's order."""

    item: Item
    question: Question
    votes: tuple[int, int]
    neither: int = 0
    """Number of votes that neither picture matches the caption."""

    @property
    def total(self) -> int:
        """Number of counted votes."""
        return sum(self.votes) + self.neither

    @property
    def winner(self) -> int | None:
        """Index of the system with more votes; None for a tie or no votes."""
        first, second = self.votes
        return None if first == second else int(second > first)


@dataclass(frozen=True)
class Results:
    """A study with its counted votes; ``annotators`` are by name, in the order of their first votes."""

    study: Study
    key: Key
    annotators: Mapping[str, AnnotatorFigures]
    pairs: Sequence[PairVotes]

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two systems in the key's order."""
        first, second = self.key.systems
        return first, second

    def pairs_of(self, question: Question) -> list[PairVotes]:
        """Return every pair's votes on the question, in the order of the study's items."""
        return [pair for pair in self.pairs if pair.question == question]


@dataclass(frozen=True)
class Majority:
    """Number of pairs that a system won by majority vote, and its share of the decided pairs."""

    pairs: int
    share: Share | None


@dataclass(frozen=True)
class QuestionFigures:
    """Outcome of one question; dictionaries are by system."""

    wording: str
    majority: dict[str, Majority]
    decided: int
    """Number of pairs without a tie."""
    ties: int
    without_votes: int
    with_all_votes: int
    p_value: float | None
    votes: dict[str, int]
    pairs_by_votes: dict[str, list[int]]
    """Number of complete pairs in which 0, 1, ... annotators chose the system."""
    fleiss_kappa: float | None
    """Agreement on the better system, without votes for neither."""
    agreement: float | None
    pairs_in_kappa: int
    neither: int = 0
    """Number of votes for neither."""
    pairs_neither: int = 0
    """Number of pairs in which neither has more votes than each system."""
    fleiss_kappa_three: float | None = None
    """Agreement with neither as a third category; None if nobody voted for it."""
    agreement_three: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudyFigures:
    """Contents of report.json."""

    format: str = field(default="dalle-human-study-report", init=False)
    version: int = field(default=1, init=False)
    study: str
    systems: dict[str, str]
    captions: str
    captions_left_out: int
    seed: int
    pairs: int
    checks: int
    annotators_wanted: int
    confidence: float
    exclusion_rule: str
    questions: dict[Question, QuestionFigures]
    annotators: list[AnnotatorFigures]
    warnings: list[str]


def count_votes(study: Study, key: Key, votes: Sequence[Vote]) -> Results:
    """Count the votes by pair, question and system, without excluded annotators."""
    annotators = _annotators(study, votes)
    counted = Counter(
        (vote.item, vote.question, vote.answer) for vote in votes if not annotators[vote.annotator].excluded
    )
    names = list(key.systems)
    pairs = []
    for question in QUESTIONS:
        for item in study.pairs:
            by_system = [0, 0]
            for side in SIDES:
                by_system[names.index(system_on(key, item, side))] += counted[item.id, question, side]
            neither = counted[item.id, question, "neither"]
            pairs.append(PairVotes(item, question, (by_system[0], by_system[1]), neither))
    return Results(study, key, annotators, pairs)


def system_on(key: Key, item: Item, side: Side) -> str:
    """Return the name of the system whose picture is on a side of a pair."""
    return key.items[item.id].left if side == "left" else key.items[item.id].right


def study_figures(results: Results) -> StudyFigures:
    """Return the figures of a study."""
    study, key = results.study, results.key
    questions = {question: _question(results, question) for question in QUESTIONS}
    rule = (
        f"An annotator who answers more than {WRONG_SHARE_PERCENT}% of all the study's check questions wrongly (more "
        f"than {study.wrong_allowed} of {len(study.checks) * len(QUESTIONS)}) is excluded."
        if study.checks
        else "The study has no attention checks; nobody is excluded."
    )
    return StudyFigures(
        study=study.sha256,
        systems=key.systems,
        captions=key.captions,
        captions_left_out=key.captions_left_out,
        seed=key.seed,
        pairs=len(study.pairs),
        checks=len(study.checks),
        annotators_wanted=study.annotators,
        confidence=CONFIDENCE,
        exclusion_rule=rule,
        questions=questions,
        annotators=list(results.annotators.values()),
        warnings=_warnings(results, questions),
    )


def _annotators(study: Study, votes: Sequence[Vote]) -> dict[str, AnnotatorFigures]:
    total: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for vote in votes:
        total[vote.annotator] += 1
        right_answer = study.by_id[vote.item].check
        if right_answer is not None and vote.answer != "neither":
            answered[vote.annotator] += 1
            wrong[vote.annotator] += vote.answer != right_answer
    return {
        name: AnnotatorFigures(f"A{number}", count, answered[name], wrong[name], wrong[name] > study.wrong_allowed)
        for number, (name, count) in enumerate(total.items(), start=1)
    }


def _question(results: Results, question: Question) -> QuestionFigures:
    pairs, names, wanted = results.pairs_of(question), results.names, results.study.annotators
    winners = [pair.winner for pair in pairs]
    totals, neither = [pair.total for pair in pairs], sum(pair.neither for pair in pairs)
    decided = len(pairs) - winners.count(None)
    counts = np.array([[*pair.votes, pair.neither] for pair in pairs], dtype=np.int64).reshape(-1, 3)
    agreement, three = fleiss_kappa(counts[:, :2]), fleiss_kappa(counts) if neither else None
    complete = [pair.votes for pair in pairs if pair.total == wanted]
    return QuestionFigures(
        wording=WORDING[question],
        majority={
            name: Majority(winners.count(system), wilson(winners.count(system), decided))
            for system, name in enumerate(names)
        },
        decided=decided,
        ties=sum(pair.winner is None and sum(pair.votes) > 0 for pair in pairs),
        without_votes=totals.count(0),
        with_all_votes=sum(votes >= wanted for votes in totals),
        p_value=sign_test(winners.count(0), decided),
        votes={name: sum(pair.votes[system] for pair in pairs) for system, name in enumerate(names)},
        pairs_by_votes={
            name: [sum(votes[system] == count for votes in complete) for count in range(wanted + 1)]
            for system, name in enumerate(names)
        },
        fleiss_kappa=None if agreement is None else agreement.kappa,
        agreement=None if agreement is None else agreement.observed,
        pairs_in_kappa=sum(sum(pair.votes) >= 2 for pair in pairs),
        neither=neither,
        pairs_neither=sum(pair.neither > max(pair.votes) for pair in pairs),
        fleiss_kappa_three=None if three is None else three.kappa,
        agreement_three=None if three is None else three.observed,
    )


def _warnings(results: Results, questions: Mapping[Question, QuestionFigures]) -> list[str]:
    warnings = []
    pairs, wanted = len(results.study.pairs), results.study.annotators
    for question, figures in questions.items():
        if lacking := pairs - figures.with_all_votes:
            warnings.append(
                f"{question}: {lacking} of {pairs} pairs have fewer than the {wanted} votes wanted; serve the study to "
                "more annotators, who are asked about these alone"
            )
        if figures.ties:
            warnings.append(f"{question}: {figures.ties} pairs are split evenly and count for neither system")
    if pairs < FEW_PAIRS:
        warnings.append(f"{pairs} pairs are few: the intervals are wide, and hold for these captions alone")
    excluded = [annotator.label for annotator in results.annotators.values() if annotator.excluded]
    if excluded:
        warnings.append(f"excluded by the attention checks: {', '.join(excluded)}")
    if not results.study.checks:
        warnings.append("the study has no attention checks: votes given without looking count like the others")
    return warnings
