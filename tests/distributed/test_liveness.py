"""A rank that hangs ends the run with a line that names it, and is not left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import hanging
from helpers.killed_runs import journal_lines
from helpers.running import ENVIRONMENT, smallest_recipe, write_recipe
from helpers.token_stores import write_tokens

from dalle_cli.distributed import liveness, spawn
from dalle_cli.distributed.group import TIMEOUT, join_group
from dalle_cli.errors import UserError

SECONDS = 2
CASES = {"1:SIGSTOP": 1, "0:SIGSTOP": 0, "2:SIGKILL": 2}
"""Signals and the ranks that get them, one of which is rank 0, where the store is; one kills the rank."""


@pytest.fixture(scope="module")
def messages() -> list[dict[str, tuple[str, int]]]:
    """The messages and exit codes of the other ranks in each case."""
    environment = {**ENVIRONMENT, "DALLE_TIMEOUT": str(SECONDS)}
    command = [sys.executable, hanging.__file__, *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("case", CASES)
def test_the_other_ranks_name_it(case: str, messages: list[dict[str, tuple[str, int]]]) -> None:
    which, found = CASES[case], messages[list(CASES).index(case)]
    assert set(found) == {str(rank) for rank in range(hanging.COUNT)} - {str(which)}
    for rank, (line, code) in found.items():
        assert code == 2
        assert line.startswith(f"rank {rank} of {hanging.COUNT}: lost the other ranks (")
        assert f"rank {which} does not answer: it ended or hangs; read the last messages" in line
        assert "resumes from the last checkpoint" in line


def test_a_hung_rank_that_gpus_started_is_named_and_ended(tmp_path: Path) -> None:
    store = write_tokens(tmp_path / "tokens.zarr", 80, 48, 400, 4, 16)
    settings = smallest_recipe(tmp_path, None)
    settings["prior"]["training"] |= {"updates": 1_000_000, "save_every": 1_000_000, "log_every": 7}
    settings["prior"]["learning_rate"] = {"peak": 1e-4, "schedule": "constant"}
    recipe, run = write_recipe(tmp_path, settings), tmp_path / "run"
    program = "from dalle_cli.distributed import spawn; spawn.GRACE_SECONDS = 1; from dalle_cli.app import main; main()"
    words = ["train-prior", recipe, "--tokens", store, "--out", run, "--gpus", "2"]
    launcher = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        env={**ENVIRONMENT, "DALLE_TIMEOUT": str(SECONDS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not any(line["step"] >= 14 for line in journal_lines(run)):
            assert time.monotonic() < deadline
            assert launcher.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        (stopped,) = [pid for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(int(stopped), signal.SIGSTOP)
        _, error = launcher.communicate(timeout=150)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.communicate()
    assert launcher.returncode == 2
    assert "Traceback" not in error
    assert "dalle: rank 0 of 2: lost the other ranks (" in error
    assert "rank 1 does not answer: it ended or hangs" in error
    assert error.splitlines()[-1].startswith(
        "dalle: rank 0 of 2 ended with exit code 2; rank 1 hung and was ended: read their messages"
    )
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)


def test_timeouts_fit_together_and_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TIMEOUT.total_seconds() == 600
    # Ranks that wait report the hung one before the launcher, which has seen a rank leave, ends them.
    assert liveness.ANSWER_SECONDS < spawn.GRACE_SECONDS
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for wrong in ("soon", "0", "1.5"):
        monkeypatch.setenv("DALLE_TIMEOUT", wrong)
        with pytest.raises(UserError, match=f"DALLE_TIMEOUT is '{wrong}', not a whole number of seconds"), join_group():
            pass


def test_absent_ranks_are_found_by_bisection() -> None:
    asked = []

    def all_present(ranks: range) -> bool:
        asked.append(ranks)
        return not {5, 900} & set(ranks)

    assert liveness.find_absent(all_present, 0, 1024) == [5, 900]
    assert len(asked) < 50
    assert liveness.find_absent(lambda _: True, 0, 1024) == []
    assert liveness.describe_absent([5, 900]).startswith("ranks 5, 900 do not answer")
    assert "one was too slow" in liveness.describe_absent([])
    assert liveness.absent_ranks(0, 2) is None
    assert "never started" in liveness.describe_absent(None)
