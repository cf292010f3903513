"""Runs three gloo ranks of which one gets a signal, for test_liveness.py: python hanging.py RANK:SIGNAL ...

Prints as JSON, for each case, the last message and the exit code of each of the other ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.connection import Connection

import torch

from dalle_cli.distributed.group import join_group
from dalle_cli.errors import UserError

COUNT = 3


def work(rank: int, port: int, pipe: Connection) -> None:
    """Sum until the other ranks are lost."""
    variables = {"RANK": rank, "WORLD_SIZE": COUNT, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": COUNT, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    try:
        with join_group() as group:
            for i in range(10**9):
                group.sum(torch.ones(()))
                if i == 10:
                    pipe.send("at work")
    except UserError as error:
        pipe.send(str(error))
        sys.exit(2)


def signal_one(which: int, how: int) -> dict[int, tuple[str, int | None]]:
    """Send rank ``which`` a signal and return the others' messages and exit codes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(COUNT)]
    processes = [context.Process(target=work, args=(rank, port, pipes[rank][1])) for rank in range(COUNT)]
    for process in processes:
        process.start()
    messages = {}
    try:
        for ours, _ in pipes:
            assert ours.poll(60)
            assert ours.recv() == "at work"
        os.kill(processes[which].pid or 0, how)
        for rank in set(range(COUNT)) - {which}:
            line = pipes[rank][0].recv() if pipes[rank][0].poll(120) else "nothing"
            processes[rank].join(30)
            messages[rank] = line, processes[rank].exitcode
    finally:
        for process in processes:
            process.kill()
            process.join()
    return messages


def main() -> None:
    torch.set_num_threads(1)
    cases = [word.partition(":") for word in sys.argv[1:]]
    print(json.dumps([signal_one(int(which), signal.Signals[how]) for which, _, how in cases]))


if __name__ == "__main__":
    main()
