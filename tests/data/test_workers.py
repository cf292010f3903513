from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.errors import UserError


class _Fails:
    def __call__(self, block: range) -> int:
        if block.start >= 40:
            raise UserError("here")
        return sum(block)


def test_results_come_in_order_and_errors_are_raised() -> None:
    blocks = split_blocks(range(40), 3)
    assert [*blocks[0]] == [0, 1, 2]
    assert len(blocks) == 14
    assert [*blocks[-1]] == [39]
    for workers in (1, 3):
        assert list(map_blocks(_Fails(), blocks, workers)) == [sum(block) for block in blocks]
        with pytest.raises(UserError, match="here"):
            list(map_blocks(_Fails(), split_blocks(range(90), 3), workers))


class _Dies:
    def __call__(self, block: range) -> int:
        if block.start == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return sum(block)


def test_a_killed_worker_is_reported_in_one_line() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(map_blocks(_Dies(), split_blocks(range(12), 3), 2))


def _runs(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return not done.stdout.strip().startswith("Z") and bool(done.stdout.strip())


def test_a_killed_run_leaves_no_worker() -> None:
    code = (
        "import os, time\n"
        "from dalle_cli.data.workers import split_blocks, map_blocks\n"
        "def slow(block):\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"  # a print's two writes might interleave
        "    time.sleep(60)\n"
        "list(map_blocks(slow, split_blocks(range(4), 1), 2))\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    workers = [int(run.stdout.readline()) for _ in range(2)]
    run.kill()
    run.wait()
    for _ in range(100):
        time.sleep(0.1)
        if not any(_runs(worker) for worker in workers):
            return
    raise AssertionError(f"still running: {workers}")
