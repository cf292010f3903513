"""Runs of a small prior on several gloo ranks, and their comparison with a run of one process."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from dalle_cli.config.load import load_recipe
from dalle_cli.prior.train import train_prior
from dalle_cli.stores.checkpoint import Checkpoint, open_checkpoint
from helpers.processes import free_ports, outputs_of, start
from helpers.running import ENVIRONMENT, smallest_recipe, write_recipe
from helpers.token_stores import write_tokens

UPDATES, HALF = 20, 10
RUNS_A_PROCESS = 5
"""Number of runs one after another in a process, since importing torch takes longest."""
COMMON = {"training.updates": UPDATES, "training.save_every": HALF, "training.keep": 3, "training.validate_every": 5}
CLIP = {"adam.clip_norm": 0.5}
"""The gradients' norm is between 1.4 and 3.2, so every update is clipped."""


def make_inputs(root: Path) -> tuple[Path, Path]:
    """Write a recipe of a prior whose sizes two ranks cannot share evenly, and a token store for it."""
    settings = smallest_recipe(root, None)
    settings["prior"]["model"] = {"layers": 3, "heads": 3, "d_head": 5, "d_model": 15, "grid": 4}
    settings["prior"]["training"] |= {"batch_size": 8}
    settings["monitoring"] = {"peak_tflops": 1.0}
    settings["prior"]["learning_rate"] = {
        "peak": 3e-3,
        "warmup_updates": 0,
        "schedule": "plateau",
        "plateau_validations": 1,
    }
    return write_recipe(root, settings), write_tokens(root / "tokens.zarr", 80, 48, 400, 4, 16)


PROGRAM = """
import json, pathlib, sys
import torch
from dalle_cli.config.load import load_recipe
from dalle_cli.distributed.group import exit_rank, join_group

recipe = load_recipe(pathlib.Path(sys.argv[1]), sys.argv[2:])
generator = torch.Generator().manual_seed(0)
text = torch.randint(400, (8, 48), generator=generator)
image = torch.randint(16, (8, 16), generator=generator)
with join_group() as group:
    def loss_of(module):
        part = group.part(8)
        found = module(text[part], torch.full((8 // group.size,), 48), image[part], 188.0)
        return (found.text + found.image) / 2

BODY
exit_rank(0)
"""


def run_on_ranks(body: str, made: tuple[Path, Path], changes: dict[str, Any], count: int = 2) -> list[Any]:
    """Run a Python program on ``count`` ranks and return the JSON that each prints.

    It finds the changed ``recipe``, the ``group`` and ``loss_of(module)``, the loss of a batch that the ranks share.
    """
    (port,) = free_ports(1)
    program = PROGRAM.replace("BODY", textwrap.indent(body, "    "))
    sets = [f"{key}={value}" for key, value in changes.items()]
    processes = []
    for rank in range(count):
        variables = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        variables["MASTER_PORT"] = port
        environment = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in variables.items()}}
        words = [sys.executable, "-c", program, str(made[0]), *sets]
        processes.append(
            subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = outputs_of(processes, 600)
    assert [process.returncode for process in processes] == [0] * count, "\n".join(error for _, error in outputs)
    return [json.loads(out) for out, _ in outputs]


def command(made: tuple[Path, Path], out: Path, changes: dict[str, Any]) -> list[Any]:
    recipe, store = made
    sets = [word for key, value in {**COMMON, **changes}.items() for word in ("--set", f"prior.{key}={value}")]
    return ["train-prior", recipe, "--tokens", store, "--out", out, *sets]


def run_together(commands: list[list[Any]], count: int) -> list[str]:
    """Run ``commands`` on ``count`` ranks, check that Python warns of nothing, and return the stderr of each."""
    processes = start(commands, timeout=600, count=count)
    outputs = outputs_of(processes, 1200)
    assert [process.returncode for process in processes] == [0] * count, "\n".join(error for _, error in outputs)
    assert not [line for _, error in outputs for line in error.splitlines() if "Warning: " in line]
    return [error for _, error in outputs]


def run_all(made: tuple[Path, Path], root: Path, runs: list[tuple[str, dict[str, Any]]], count: int = 2) -> str:
    """Make runs on ``count`` ranks, each in its folder in ``root``, and return what the first rank said."""
    said = ""
    for first in range(0, len(runs), RUNS_A_PROCESS):
        some = runs[first : first + RUNS_A_PROCESS]
        said += run_together([command(made, root / name, changes) for name, changes in some], count)[0]
    return said


def train_alone(made: tuple[Path, Path], out: Path, **changes: Any) -> Path:
    """Train in this process and return the run's folder."""
    recipe, store = made
    sets = [f"prior.{key}={value}" for key, value in {**COMMON, **changes}.items()]
    train_prior(load_recipe(recipe, sets), store, out)
    return out


def losses(run: Path) -> list[float]:
    """Return the loss of every update and every validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "val_loss") if key in line]


def farthest(one: Checkpoint, other: Checkpoint) -> float:
    """Return the largest difference of weights and EMA weights."""
    pairs = [(one.tensors(kind), other.tensors(kind)) for kind in ("raw", "ema")]
    assert all(ours.keys() == theirs.keys() for ours, theirs in pairs)
    return max(
        float((ours[name].float() - theirs[name].float()).abs().max()) for ours, theirs in pairs for name in ours
    )


def assert_same_bytes(parts: Path, whole: Path) -> None:
    assert open_checkpoint(parts).files == open_checkpoint(whole).files
    assert losses(parts) == losses(whole)


def assert_same_run(found: Path, expected: Path, first: int = 0, weights: float = 1e-5) -> None:
    """Check that losses from the ``first`` on agree to 1e-5, the last weights to ``weights``, and that losses fell."""
    ours, theirs = losses(expected), losses(found)
    assert len(theirs) == len(ours) - first
    assert max(abs(a - b) for a, b in zip(ours[first:], theirs, strict=True)) < 1e-5
    assert ours[0] - ours[-1] > 0.1
    assert farthest(open_checkpoint(expected), open_checkpoint(found)) < weights
