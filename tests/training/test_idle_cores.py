"""The number of threads follows what other programs do, by files as Linux writes them and by real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dalle_cli.errors import UserError
from dalle_cli.training import idle_cores
from dalle_cli.training.idle_cores import IdleCores, ticks_of_cores, ticks_of_program

SPIN = "while True: pass"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, int]]:
    """Return the looks (seconds, ticks of all cores, ticks of this program) that will be taken, in order."""
    coming: list[tuple[float, int, int]] = []
    monkeypatch.setattr(IdleCores, "_look", lambda self: coming.pop(0))
    monkeypatch.setattr(idle_cores.time, "monotonic", lambda: 1e9)
    before = torch.get_num_threads()
    yield coming
    torch.set_num_threads(before)


def test_threads_follow_the_others_after_two_looks(looks: list[tuple[float, int, int]]) -> None:
    hertz = os.sysconf("SC_CLK_TCK")
    torch.set_num_threads(4)
    # Others use no core, then 1.0 of 4 twice, 2.4 once, 0.1 twice, and 4.0 twice.
    used = [0.0, 1.0, 1.0, 2.4, 0.1, 0.1, 4.0, 4.0]
    work = own = 0.0
    looks.append((0.0, 0, 0))
    for number, others in enumerate(used, 1):
        own += 1.5 * hertz
        work += (1.5 + others) * hertz
        looks.append((float(number), round(work), round(own)))
    threads = IdleCores({0, 1, 2, 3})
    counts = []
    for _ in used:
        threads.follow()
        counts.append(torch.get_num_threads())
    assert counts == [4, 4, 3, 3, 3, 4, 4, 1]


def test_threads_never_exceed_those_at_the_start(looks: list[tuple[float, int, int]]) -> None:
    torch.set_num_threads(2)
    looks.extend((float(number), 0, 0) for number in range(4))
    threads = IdleCores({0, 1, 2, 3})
    for _ in range(3):
        threads.follow()
    assert torch.get_num_threads() == 2


def test_ticks_are_those_of_the_cores_and_of_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 4000 5 6 7 8 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\nintr 5\n")
    monkeypatch.setattr(idle_cores, "_STAT", stat)
    assert ticks_of_cores({0}) == 100 + 20 + 30 + 6 + 7
    assert ticks_of_cores({0, 1, 7}) == 163 + 5
    monkeypatch.setattr(idle_cores, "_STAT", tmp_path / "none")
    with pytest.raises(UserError, match=r"threads: idle needs /proc/stat"):
        IdleCores()


def test_a_child_counts_as_this_program_and_a_stranger_does_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        own, alone = ticks_of_program(os.getpid()), ticks_of_program(child.pid)
        deadline = time.monotonic() + 60
        while ticks_of_program(child.pid) < alone + 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ticks_of_program(os.getpid()) - own >= ticks_of_program(child.pid) - alone - 5 > 10
        assert ticks_of_program(2**22 + 1) == 0
    finally:
        child.kill()
        child.wait()
