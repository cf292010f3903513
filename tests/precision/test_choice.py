"""The least of a few timings counts, and a choice that cannot be kept is made again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle_cli.errors import UserError
from dalle_cli.precision.choice import faster_precision, seconds_of


def taking(**seconds: float) -> Callable[[str], Callable[[], None]]:
    """Return trials whose work takes so long in each precision."""
    return lambda precision: lambda: time.sleep(seconds[precision])


def chosen(trial: Callable[[str], Callable[[], None]]) -> str:
    return faster_precision("prior.precision", "an update", {"layers": 3}, trial)[0]


def test_the_least_of_a_few_timings_counts() -> None:
    seconds = iter([0.05, 0.03, 0.001, 0.02, 0.03, 0.03])
    assert 0.001 <= seconds_of(lambda: time.sleep(next(seconds))) < 0.02
    assert next(seconds, None) is None


def test_no_round_begins_once_patience_is_over() -> None:
    rounds = []
    seconds_of(lambda: rounds.append(time.sleep(0.02)), patience=0.03)
    assert len(rounds) == 2
    assert seconds_of(lambda: time.sleep(0.02), patience=0.01) >= 0.02  # the round to warm up, where it is the only one


def test_work_that_is_far_slower_in_bf16_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rounds = {"fp32": 0, "bf16": 0}

    def trial(precision: str) -> Callable[[], None]:
        def work() -> None:
            rounds[precision] += 1
            time.sleep({"fp32": 0.001, "bf16": 0.2}[precision])

        return work

    assert chosen(trial) == "fp32"
    assert rounds == {"fp32": 6, "bf16": 1}


def test_where_nothing_can_be_kept_it_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise UserError("No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("dalle_cli.precision.choice.write_json", full)
    assert chosen(taking(fp32=0.01, bf16=0.0)) == "bf16"
    assert chosen(taking(fp32=0.0, bf16=0.01)) == "fp32"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert chosen(taking(fp32=0.01, bf16=0.0)) == "bf16"
