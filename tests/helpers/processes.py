"""Several ranks of one command, started with a launcher's environment."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from helpers.running import ENVIRONMENT, Chain

# Runs several commands one after another in one process, each in a new group, because importing torch takes longest.
PROGRAM = """
import json, os, sys
from datetime import timedelta
from dalle_cli.app import run_arguments
from dalle_cli.distributed import group
group.TIMEOUT = timedelta(seconds=float(sys.argv[1]))
for port, *arguments in json.loads(sys.argv[2]):
    os.environ["MASTER_PORT"], sys.argv = str(port), ["dalle", *arguments]
    try:
        run_arguments()
    except SystemExit as end:
        if end.code:
            group.exit_rank(end.code)
            raise
group.exit_rank(0)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def outputs_of(processes: list[subprocess.Popen[str]], timeout: float) -> list[tuple[str, str]]:
    """Wait for all ``processes`` and return the stdout and stderr of each.

    All pipes are read at once: a rank whose pipe is full would stop, and the others would wait for it.
    """
    with ThreadPoolExecutor(len(processes)) as readers:
        return list(readers.map(lambda process: process.communicate(timeout=timeout), processes))


def start(commands: list[list[Any]], timeout: float = 60, count: int = 2) -> list[subprocess.Popen[str]]:
    """Start ``count`` ranks that run ``commands`` together; the word RANK in a command becomes the rank."""
    ports = free_ports(len(commands))
    processes = []
    for rank in range(count):
        words = [
            [port, *(str(word).replace("RANK", str(rank)) for word in command)]
            for port, command in zip(ports, commands, strict=True)
        ]
        variables = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        variables["LOCAL_WORLD_SIZE"] = str(count)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(timeout), json.dumps(words)],
                env={**ENVIRONMENT, **variables, "MASTER_PORT": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


HALF, WHOLE = 4, 8
# Adam divides by a gradient's size, which magnifies the rounding of gradients near zero; eps bounds that.
COMMON = {
    "training.updates": WHOLE, "training.save_every": HALF, "training.validate_every": 2, "training.keep": 9,
    "training.batch_size": 5, "learning_rate.peak": 1e-3, "adam.clip_norm": 0.5,
    "adam.eps": 1e-4, "learning_rate.warmup_updates": 0,
}  # fmt: skip


def command(chain: Chain, stage: str, out: Path, changes: dict[str, Any]) -> list[Any]:
    """Return the command that trains a stage of ``chain`` into ``out`` with ``changes`` to its settings."""
    source = ["--data", chain.train] if stage == "dvae" else ["--tokens", chain.tokens]
    sets = [word for key, value in {**COMMON, **changes}.items() for word in ("--set", f"{stage}.{key}={value}")]
    return [f"train-{stage}", chain.recipe, *source, "--out", out, *sets]
