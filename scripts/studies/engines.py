#!/usr/bin/env python3
r"""Measure the time and the memory of FSDP and DeepSpeed without a GPU, beside the bytes that ``dalle plan`` counts.

    .venv/bin/python scripts/studies/engines.py --tokens runs/quickstart/tokens.zarr
    .venv/bin/python scripts/studies/engines.py --tokens runs/quickstart/tokens.zarr --ranks 1 --nvme /mnt/nvme \
        --set prior.model.layers=8 --set prior.model.heads=16 --set prior.model.d_model=1024

The script trains the recipe's prior for a few updates on --ranks gloo ranks, once with each engine, ZeRO stage and
place to offload to, and prints a table. The measured memory is a rank's peak beyond that of the imported libraries.
Without a GPU, what would be on it and what is offloaded to host memory are in the same place, and the plan's column
adds both.
Files on the disk of --nvme are counted as they lie there at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.planning.fit import check_fit
from dalle_cli.planning.memory import Machines
from dalle_cli.prior.counts import count_parameters

FIRST_UPDATES = 3
"""Number of first updates whose time is not counted."""
RANK = """
import atexit, os, pathlib, resource, sys

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def write():
    pathlib.Path(report).write_text(f"{libraries} {peak()}")

report, engine = sys.argv[1:3]
sys.argv = ["dalle", *sys.argv[3:]]
import dalle_cli.distributed.fsdp, dalle_cli.prior.train
if engine == "deepspeed":
    import deepspeed
from dalle_cli.app import main
libraries = peak()
atexit.register(write)
main()
"""


@dataclass(frozen=True)
class Case:
    """A way to train: settings of ``prior.sharding``."""

    engine: str
    zero: int
    offload: str = "none"

    @property
    def name(self) -> str:
        return f"{self.engine}, ZeRO {self.zero}" + (f", offload {self.offload}" if self.offload != "none" else "")


@dataclass(frozen=True)
class Figures:
    """Time and memory of a run; sizes are a rank's, in bytes."""

    seconds: float
    """Median seconds of an update."""
    libraries: int
    measured: int
    """Peak of the resident memory beyond ``libraries``."""
    planned: int
    on_disk: int
    planned_on_disk: int


def main() -> None:
    """Parse the command line, train with each case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="token store to train on")
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path("recipes/quickstart.yaml"),
        help="recipe of the prior [recipes/quickstart.yaml]",
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes [2]")
    parser.add_argument("--updates", type=int, default=12, help="updates of each run [12]")
    parser.add_argument("--nvme", type=Path, help="folder to offload to; without it nothing is offloaded to a disk")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    options = parser.parse_args()
    updates = options.updates
    common = [
        f"prior.training.{key}={updates}" for key in ("updates", "save_every", "validate_every")
    ] + ["threads=1", "prior.precision=fp32", "prior.training.log_every=1", *options.set]  # fmt: skip
    print("| engine | seconds an update | libraries | measured beyond them | planned | on the disk | planned there |")
    print("|---|---|---|---|---|---|---|")
    for case in cases(options.ranks, options.nvme):
        sets = [*common, *(f"prior.sharding.{key}={value}" for key, value in vars(case).items())]
        sets += [f"prior.sharding.nvme_path={options.nvme}"] if case.offload == "nvme" else []
        try:
            recipe = load_recipe(options.recipe, sets)
            with tempfile.TemporaryDirectory() as folder:
                words = ["train-prior", str(options.recipe), "--tokens", str(options.tokens)]
                words += [word for setting in sets for word in ("--set", setting)]
                found = measure(case, recipe, words, options.ranks, Path(folder), options.nvme)
        except UserError as error:
            parser.exit(2, f"engines: {error}\n")
        sizes = (found.libraries, found.measured, found.planned, found.on_disk, found.planned_on_disk)
        print(f"| {case.name} | {found.seconds:.3f} | " + " | ".join(f"{size / 1e9:.2f} GB" for size in sizes) + " |")
        sys.stdout.flush()


def cases(ranks: int, nvme: Path | None) -> list[Case]:
    """Return the cases to compare; FSDP's stages are for several ranks."""
    fsdp = [Case("fsdp", zero) for zero in ((2, 3) if ranks > 1 else (0,))]
    whole = [Case("deepspeed", zero) for zero in (1, 2, 3)]
    offloaded = [Case("deepspeed", zero, "cpu") for zero in (2, 3)]
    return [*fsdp, *whole, *offloaded, *([] if nvme is None else [Case("deepspeed", 3, "nvme")])]


def measure(case: Case, recipe: Recipe, words: list[str], ranks: int, folder: Path, nvme: Path | None) -> Figures:
    """Run a case and return its figures: the first rank's time, and the largest peak.

    Raises:
        UserError: a rank failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / "run"
    reports = [folder / f"peak-{rank}" for rank in range(ranks)]
    processes = []
    for rank, report in enumerate(reports):
        launch = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
        command = [sys.executable, "-c", RANK, str(report), case.engine, *words, "--out", str(out)]
        environment = {**os.environ, **{name: str(value) for name, value in launch.items()}}
        processes.append(subprocess.Popen(command, env=environment, stdout=sys.stderr))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise UserError(f"{case.name}: a rank failed; read its last lines above")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line][FIRST_UPDATES:]
    sizes = [tuple(map(int, report.read_text().split())) for report in reports]
    libraries, peak = max(sizes, key=lambda pair: pair[1] - pair[0])
    fit = check_fit(recipe, count_parameters(recipe), Machines(ranks, 1, 0, on_cpu=True))
    swapped = 0
    if case.offload == "nvme" and nvme is not None:
        swapped = sum(file.stat().st_size for file in nvme.rglob("*.swp")) // ranks
    return Figures(
        recipe.prior.training.batch_size / median(rates),
        libraries,
        peak - libraries,
        fit.peak + fit.on_host,
        swapped,
        fit.on_disk,
    )


if __name__ == "__main__":
    main()
