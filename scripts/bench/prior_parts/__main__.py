"""Run the parts and write their results; see scripts/bench/prior."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dalle_cli.config.load import load_recipe
from dalle_cli.distributed.device import keep_freed_memory
from prior_parts import attention, quickstart, recipe, sampling, sampling_memory, step, step_memory
from prior_parts.machine import describe_machine
from prior_parts.peer import load_peer
from prior_parts.quickstart import UPDATES
from prior_parts.report import render

ON_CPU_ONLY = ("step-memory", "quickstart", "sampling", "sampling-memory")
ON_GPU = ("recipe",)
"""Too large for a CPU, unless it is asked for with a small recipe."""


def log(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def parts(
    device: str, with_peer: bool, quick: bool, path: Path, changes: list[str]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the parts that can be run, by name; ``path`` and ``changes`` name the recipe of the part ``recipe``."""
    peer = load_peer() if with_peer else None
    attention_sizes, step_sizes, sampling_sizes, updates = attention.Sizes(), step.Sizes(), sampling.Sizes(), UPDATES
    if device == "cuda":
        attention_sizes = replace(attention_sizes, batches=(1, attention.GPU_BATCH))
    if quick:
        attention_sizes = replace(attention_sizes, batches=(1,), rounds=2)
        step_sizes = replace(step_sizes, batches=(1,), rounds=1)
        sampling_sizes = replace(sampling_sizes, layers=4, batches=(1,), rounds=1, rows=2)
        updates = 30
    return {
        "attention": lambda: attention.measure(attention_sizes, device, log),
        "step": lambda: step.measure(step_sizes, peer, device, log),
        "step-memory": lambda: step_memory.measure(step_sizes, log),
        "quickstart": lambda: quickstart.measure(log, updates),
        "sampling": lambda: sampling.measure(sampling_sizes, peer, log),
        "sampling-memory": lambda: sampling_memory.measure(sampling_sizes, log),
        "recipe": lambda: recipe.measure(load_recipe(path, changes), device, log),
    }


def main() -> None:
    """Parse the command line, measure and print the results."""
    parser = argparse.ArgumentParser(prog="scripts/bench/prior", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", help="attention, step, step-memory, quickstart, sampling, sampling-memory, recipe"
    )
    parser.add_argument(
        "--recipe", type=Path, help="of the part recipe [recipes/1b.yaml, with --quick recipes/quickstart.yaml]"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    parser.add_argument("--no-peer", action="store_true", help="leave dalle-pytorch out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds at batch 1, smaller models: under a minute a part, to see that it runs; prints and keeps "
        "nothing",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the results [benchmarks]")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.device == "cpu":
        keep_freed_memory()  # as ``dalle`` does on a CPU; it helps all contenders alike
    recipe_path = given.recipe or Path("recipes") / ("quickstart.yaml" if given.quick else "1b.yaml")
    known = parts(given.device, not given.no_peer, given.quick, recipe_path, given.set)
    left_out = ON_GPU if given.device == "cpu" else ON_CPU_ONLY
    wanted = given.parts or [name for name in known if name not in left_out]
    for name in wanted:
        if name not in known or (given.device == "cuda" and name in ON_CPU_ONLY):
            parser.error(f"{name}: no such part on {given.device}; there are {', '.join(known)}")
    path = given.out / ("prior.json" if given.device == "cpu" else "prior-gpu.json")
    results = json.loads(path.read_text()) if path.is_file() else {}
    for name in wanted:
        results[name] = {"machine": describe_machine(given.device), **known[name]()}
        if not given.quick:
            given.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            path.with_suffix(".md").write_text(render(results))
    print(render({name: results[name] for name in wanted}))


if __name__ == "__main__":
    main()
