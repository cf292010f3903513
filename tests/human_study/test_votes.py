"""The store of votes: what is asked of whom, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.human_study_folder import small_study

from dalle_cli.errors import UserError
from dalle_cli.human_study.study import QUESTIONS, load_key, load_study
from dalle_cli.human_study.votes import VoteRefused, Votes


def test_annotators_keep_their_codes_and_more_are_added(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=2)
    with Votes(out, study) as votes:
        three = votes.annotators(3)
        assert [each.name for each in three] == ["annotator-01", "annotator-02", "annotator-03"]
    with Votes(out, study) as votes, Votes(out, study) as others:
        five = votes.annotators(5)
        assert five[:3] == three
        assert others.annotators(4) == five[:4]
        assert [others.name_of(each.code) for each in five] == [each.name for each in five]
        assert [votes.name_of(code) for code in ("", "annotator-01", five[0].code + " ")] == [None] * 3


def test_a_question_is_asked_until_it_has_its_votes_and_once_of_each(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=4, annotators=2, checks=2)
    with Votes(out, study) as votes:
        for annotator in ("a", "b"):
            work = votes.work(annotator)
            assert (work.done, len(work.tasks)) == (0, 6)
            for task in work.tasks:
                assert task.questions == QUESTIONS
                votes.record(annotator, task.item, "realistic", task.item.check or "left")
                assert votes.work(annotator).tasks[0].questions == ("caption",)  # the pair begun is finished first
                votes.record(annotator, task.item, "caption", task.item.check or "right")
            assert votes.work(annotator).tasks == ()
            assert votes.work(annotator).done == 6
        assert {task.item.id for task in votes.work("c").tasks} == {item.id for item in study.checks}
        with pytest.raises(VoteRefused, match="2 annotators"):
            votes.record("c", study.pairs[0], "caption", "left")
        with pytest.raises(VoteRefused, match="before, with right"):
            votes.record("a", study.pairs[0], "caption", "left")
        assert len(votes.all()) == 2 * 6 * 2
    orders = [[task.item.id for task in Votes(tmp_path, study).work(name).tasks] for name in ("a", "b", "a")]
    assert orders[0] == orders[2] != orders[1]


def test_votes_of_who_fails_the_checks_are_asked_again_of_others(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=3, annotators=1, checks=4)
    assert study.wrong_allowed == 1  # of 8 answers
    with Votes(out, study) as votes:
        for item in study.pairs:
            for question in QUESTIONS:
                votes.record("careless", item, question, "left")
        wrong = {"left": "right", "right": "left"}
        votes.record("careless", study.checks[0], "realistic", wrong[study.checks[0].check])  # type: ignore[index, arg-type]
        assert {task.item for task in votes.work("other").tasks} == set(study.checks)
        votes.record("careless", study.checks[0], "caption", wrong[study.checks[0].check])  # type: ignore[index, arg-type]
        assert {task.item for task in votes.work("other").tasks} == set(study.items)
        votes.record("other", study.pairs[0], "caption", "right")
        with pytest.raises(VoteRefused):
            votes.record("third", study.pairs[0], "caption", "right")


def test_votes_of_another_study_and_broken_files_are_refused(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=2)
    other_out, other = small_study(tmp_path / "other", pairs=2, seed=5)
    Votes(out, study).close()
    with pytest.raises(UserError, match="votes of another study"):
        Votes(out, other)
    (other_out / "votes.sqlite").write_bytes(b"no database at all, but long enough to look at" * 10)
    with pytest.raises(UserError, match=r"votes\.sqlite"):
        Votes(other_out, other)
    (out / "key.json").write_bytes((other_out / "key.json").read_bytes())
    with pytest.raises(UserError, match="key of another study"):
        load_key(out, study)
    whole = json.loads((out / "study.json").read_text())
    whole["items"][0]["left"] = "../key.json"
    (out / "study.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"items\.0\.left"):
        load_study(out)
