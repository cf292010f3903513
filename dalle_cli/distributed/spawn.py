"""Start, watch and end several ranks of one command on this machine. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from dalle_cli.distributed.launch import read_launch
from dalle_cli.errors import STOP_SIGNALS, UserError
from dalle_cli.progress import log

GRACE_SECONDS = 20.0
"""Seconds that the other ranks have to end by themselves once one fails, and again between SIGTERM and SIGKILL."""
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


def has_launcher() -> bool:
    """Return whether a launcher started this process as a rank. A single srun task does not count.

    Raises:
        UserError: the launcher's environment contradicts itself.
    """
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ or read_launch().size > 1


def start_processes(count: int, command: Sequence[str]) -> None:
    """Run ``dalle`` with the arguments ``command`` as ``count`` ranks; return when all have succeeded.

    SIGTERM and SIGUSR1 are forwarded to all ranks. If one fails, the others get GRACE_SECONDS to end by themselves.
    No rank outlives this process, even if it is killed.

    Raises:
        UserError: a rank failed or was killed.
        SystemExit: all ranks failed with the same exit code, which is passed on.
    """
    port = _free_port()
    processes = [_start(rank, count, port, command) for rank in range(count)]
    handlers = {which: signal.signal(which, _forward_to(processes)) for which in STOP_SIGNALS}
    try:
        first = _watch(processes)
    except BaseException:
        _end(processes)
        raise
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
    if first is None:
        return
    hung = [str(rank) for rank, process in enumerate(processes) if process.poll() is None]
    _end(processes)
    codes = {process.returncode for process in processes}
    if len(codes) == 1 and (code := codes.pop()) > 0:
        raise SystemExit(code)
    others = "the others ended too"
    if hung:
        noun, verb = ("rank", "was") if len(hung) == 1 else ("ranks", "were")
        others = f"{noun} {', '.join(hung)} hung and {verb} ended"
    raise UserError(
        f"rank {first} of {count} {describe_exit(processes[first].returncode)}; {others}: read their messages and "
        "start again: training resumes from the last checkpoint"
    )


def _start(rank: int, count: int, port: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    program = [sys.executable, "-m", "dalle_cli", *command]
    # The ranks share the machine's cores.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.Popen(program, env={**threads, **os.environ, **variables}, preexec_fn=end_with_parent)


def _watch(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all ranks have ended, or GRACE_SECONDS after the first failure; return the first failed rank."""
    first, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if first is None:
            first = _first_failed(processes)
            if first is not None:
                how = describe_exit(processes[first].returncode)
                log(f"rank {first} of {len(processes)} {how}; waiting for the others")
                deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(_POLL_SECONDS)
    return _first_failed(processes) if first is None else first


def _first_failed(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Return a failed rank, if any, preferably one killed by a signal, which may have made the others fail."""
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    failed = [rank for rank, code in codes.items() if code]
    return min(failed, key=lambda rank: (codes[rank] or 0) > 0, default=None)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _forward_to(processes: list[subprocess.Popen[bytes]]) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return handler


def describe_exit(code: int) -> str:
    """Return how a process ended, given its exit code, or the negative number of the signal that ended it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def end_with_parent() -> None:
    """Have Linux end this process when its parent ends, for whatever reason; do nothing on other systems."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
