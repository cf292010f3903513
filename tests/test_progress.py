"""The shown rate is that of the last minute, slower steps draw one warning, and no line steers a terminal."""

from __future__ import annotations

import json

import pytest

from dalle_cli import progress as module
from dalle_cli.progress import RECENT, WINDOW, log, printable, printable_json, progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_rate_forgets_what_was_more_than_a_minute_ago(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 1000, "updates", start=100) as bar:
        for _ in range(200):  # 10 a second for 20 seconds
            clock.now += 0.1
            bar.advance()
        assert bar.rate() == pytest.approx(10, rel=0.01)
        for _ in range(50):  # then one in 2 seconds, for longer than the window
            clock.now += 2
            bar.advance()
        assert bar.rate() == pytest.approx(0.5, rel=0.05)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: 350/1000 updates, 0.5/s, ")
    assert last.endswith("22 min left")  # 650 updates at 0.5 a second
    assert WINDOW == 60


def test_a_job_that_resumes_does_not_count_what_was_done_before(clock: Clock) -> None:
    with progress("train", 1000, "updates", start=900) as bar:
        clock.now += 4
        bar.advance(2)
        assert bar.rate() == pytest.approx(0.5)


@pytest.mark.parametrize(("steady", "slower", "warnings"), [(True, 3.0, 1), (True, 2.0, 0), (False, 3.0, 0)])
def test_steps_that_become_slower_draw_one_warning(
    clock: Clock, capsys: pytest.CaptureFixture[str], steady: bool, slower: float, warnings: int
) -> None:
    with progress("train", None, "updates", steady=steady) as bar:
        for step in range(6 * RECENT):
            clock.now += 0.5 * (slower if step >= 2 * RECENT else 1) + (60 if step % 20 == 19 else 0)  # validations
            bar.advance()
    said = [line for line in capsys.readouterr().err.splitlines() if "times as long" in line]
    assert len(said) == warnings
    if said:
        assert said[0].startswith("train: updates take 3.0 times as long as before; if other work uses this machine's")


def test_no_line_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;title\x07 \x1b[2K\rgone \x9b1A \u202egnp.exe"
    log(f"{hostile}\n\tsecond line")
    with progress(hostile, None, "rows") as bar:
        bar.say(hostile)
        bar.advance(1, hostile)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert not any(sign in shown.err for sign in "\x1b\x07\r\x9b\u202e")
    assert shown.err.startswith(r"\x1b]0;title\x07 \x1b[2K\rgone \x9b1A \u202egnp.exe" "\n\tsecond line\n")
    kept = "größe ♥ 猫　犬 👩‍🔬 עברית é"
    assert printable(kept) == kept


def test_json_on_a_terminal_steers_nothing_and_stays_the_same() -> None:
    value = {"key": "\x9b2J\x7f\u202e\u2028 größe 👩‍👩‍👧 \x1b[2J\ud800", "n": [1, 2.5, None]}
    for indent in (None, 2):
        text = printable_json(value, indent)
        assert json.loads(text) == value
        assert printable(text) == text
        assert "größe 👩‍👩‍👧" in text
