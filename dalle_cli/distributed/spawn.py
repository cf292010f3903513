"""Several processes of one command on this machine, started, watched and ended together. Imports nothing heavy."""

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
from dalle_cli.errors import UserError
from dalle_cli.progress import log

GRACE = 20.0
"""Seconds that processes have to end by themselves once one has failed, and again between SIGTERM and SIGKILL."""
POLL = 0.1
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def is_started() -> bool:
    """Whether a launcher started this process, so that it is one of several already; srun's only task is not.

    Raises:
        UserError: the launcher's environment contradicts itself.
    """
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ or read_launch().size > 1


def start_processes(count: int, command: Sequence[str]) -> None:
    """Run ``dalle`` with the arguments ``command`` in ``count`` processes; returns when all have ended well.

    SIGTERM and SIGUSR1 are handed on to all of them. If one fails the others are given GRACE seconds to end by
    themselves; none is left behind, not even if this process is killed.

    Raises:
        UserError: a process was killed, or failed; the line names it and how it ended.
        SystemExit: all processes ended with the same exit code, which is passed on.
    """
    port = _free_port()
    processes = [_start(rank, count, port, command) for rank in range(count)]
    handlers = {which: signal.signal(which, _hand_on(processes)) for which in _FORWARDED}
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
        noun, verb = ("process", "was") if len(hung) == 1 else ("processes", "were")
        others = f"{noun} {', '.join(hung)} hung and {verb} ended"
    raise UserError(
        f"process {first} of {count} {_how(processes[first].returncode)}; {others}: see what they said, and start "
        "again: training goes on from the last checkpoint"
    )


def _start(rank: int, count: int, port: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    program = [sys.executable, "-m", "dalle_cli", *command]
    # One process has all the machine's cores for its threads; several share them.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.Popen(program, env={**threads, **os.environ, **place}, preexec_fn=_end_with_parent)


def _watch(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """The first process that failed, once all have ended or had GRACE seconds to; None if none did."""
    first, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if first is None:
            first = _failed(processes)
            if first is not None:
                log(f"process {first} of {len(processes)} {_how(processes[first].returncode)}; waiting for the others")
                deadline = time.monotonic() + GRACE
        time.sleep(POLL)
    return _failed(processes) if first is None else first


def _failed(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """The process that failed; one that was killed before others that failed for want of it."""
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    failed = [rank for rank, code in codes.items() if code]
    return min(failed, key=lambda rank: (codes[rank] or 0) > 0, default=None)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _hand_on(processes: list[subprocess.Popen[bytes]]) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return handler


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _end_with_parent() -> None:
    """On Linux, have the system end this process when its parent ends, however that came about."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
