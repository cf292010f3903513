"""Figures of a study by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.human_study_folder import small_study

from dalle_cli.human_study.results import count_votes, study_figures
from dalle_cli.human_study.study import Study, load_key
from dalle_cli.human_study.votes import Vote


def cast(study: Study, out: Path, likes: dict[str, dict[str, list[int]]]) -> list[Vote]:
    """Return the votes of annotators, on every pair.

    Args:
        study: The study.
        out: Its folder.
        likes: By annotator and question, for each caption id in order 1 if ``mine`` is preferred, else 0.
    """
    key, votes = load_key(out, study), []
    for annotator, answers in likes.items():
        for question, choices in answers.items():
            for item in study.pairs:
                entry = key.items[item.id]
                wanted = "mine" if choices[int(entry.caption_id) - 1] else "theirs"
                side = "left" if entry.left == wanted else "right"
                votes.append(Vote(annotator, item.id, question, side, "2026-01-01T00:00:00"))  # type: ignore[arg-type]
    return votes


def test_majorities_ties_and_exclusions_by_hand(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=3, annotators=3, checks=4)
    key = load_key(out, study)
    likes = {
        "a": {"realistic": [1, 1, 0], "caption": [1, 0, 0]},
        "b": {"realistic": [1, 0, 0], "caption": [1, 1, 0]},
        "c": {"realistic": [0, 1, 0]},
        "careless": {"realistic": [0, 0, 1], "caption": [0, 0, 1]},
    }
    votes = cast(study, out, likes)
    for item in study.checks:
        wrong = "left" if item.check == "right" else "right"
        votes.append(Vote("a", item.id, "caption", item.check, ""))  # type: ignore[arg-type]
        votes.append(Vote("careless", item.id, "caption", wrong, ""))  # type: ignore[arg-type]
    found = study_figures(count_votes(study, key, votes))

    realistic, caption = found.questions["realistic"], found.questions["caption"]
    assert {name: entry.pairs for name, entry in realistic.majority.items()} == {"mine": 2, "theirs": 1}
    assert realistic.votes == {"mine": 4, "theirs": 5}
    assert realistic.ties == 0
    assert realistic.decided == 3
    assert realistic.pairs_by_votes == {"mine": [1, 0, 2, 0], "theirs": [0, 2, 0, 1]}
    assert realistic.agreement == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert realistic.majority["mine"].share.value == pytest.approx(2 / 3)
    # Two annotators each: 2-0, 1-1, 0-2.
    assert {name: entry.pairs for name, entry in caption.majority.items()} == {"mine": 1, "theirs": 1}
    assert (caption.ties, caption.decided, caption.with_all_votes) == (1, 2, 0)
    assert [(a.label, a.checks_answered, a.checks_wrong, a.excluded) for a in found.annotators] == [
        ("A1", 4, 0, False), ("A2", 0, 0, False), ("A3", 0, 0, False), ("A4", 4, 4, True),
    ]  # fmt: skip
    warnings = "\n".join(found.warnings)
    assert "caption: 3 of 3 pairs have fewer than the 3 votes" in warnings
    assert "realistic: 3" not in warnings
    assert "excluded by the attention checks: A4" in warnings
    assert "split evenly" in warnings


def test_neither_counts_for_no_system_and_is_a_third_category_of_its_own(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=3, annotators=3, checks=4)
    key = load_key(out, study)
    by_caption = {key.items[item.id].caption_id: item for item in study.pairs}
    likes = {"a": {"caption": [1, 1, 1]}, "b": {"caption": [1, 0, 0]}, "c": {"caption": [0, 0, 0]}}
    votes = cast(study, out, likes)
    for annotator, caption in (("b", "3"), ("c", "3"), ("c", "2")):
        place = next(
            n for n, vote in enumerate(votes) if (vote.annotator, vote.item) == (annotator, by_caption[caption].id)
        )
        votes[place] = replace(votes[place], answer="neither")
    votes += [Vote("a", item.id, "caption", "neither", "") for item in study.checks]
    found = study_figures(count_votes(study, key, votes))
    caption = found.questions["caption"]
    # By pair, votes for mine, theirs and neither: 2 1 0, 1 1 1, 1 0 2.
    assert caption.votes == {"mine": 4, "theirs": 2}
    assert {name: entry.pairs for name, entry in caption.majority.items()} == {"mine": 2, "theirs": 0}
    assert (caption.ties, caption.decided, caption.with_all_votes, caption.pairs_in_kappa) == (1, 2, 3, 2)
    assert (caption.neither, caption.pairs_neither) == (3, 1)
    # Two ways, of the pairs with two votes: a third of the rater pairs agree on the first and none on the second.
    observed, chance = (1 / 3 + 0) / 2, (3 / 5) ** 2 + (2 / 5) ** 2
    assert caption.agreement == pytest.approx(observed)
    assert caption.fleiss_kappa == pytest.approx((observed - chance) / (1 - chance))
    observed, chance = (1 / 3 + 0 + 1 / 3) / 3, (4 / 9) ** 2 + (2 / 9) ** 2 + (3 / 9) ** 2
    assert caption.agreement_three == pytest.approx(observed)
    assert caption.fleiss_kappa_three == pytest.approx((observed - chance) / (1 - chance))
    assert found.questions["realistic"].fleiss_kappa_three is None
    assert [(a.checks_answered, a.checks_wrong, a.excluded) for a in found.annotators] == [(0, 0, False)] * 3
