"""Measure speed and memory of the prior, part by part, beside PyTorch's dense attention and dalle-pytorch."""

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
from dalle_cli.planning.fit import with_planned_precision
from dalle_cli.planning.memory import Machines
from prior_parts import attention, quickstart, recipe, sampling, sampling_memory, step, step_memory
from prior_parts.peer import load_peer
from prior_parts.quickstart import UPDATES
from prior_parts.report import describe_machine, render

CPU_PARTS = ("step-memory", "quickstart", "sampling", "sampling-memory")
"""Parts that run on a CPU only."""
GPU_PARTS = ("recipe",)
"""Parts that a CPU runs only if they are named, since the default recipe is too large for it."""


def log(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def parts(
    device: str, with_peer: bool, quick: bool, path: Path, changes: list[str]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return a function that measures each part, by the part's name.

    Args:
        device: Device to measure on, "cpu" or "cuda".
        with_peer: Whether dalle-pytorch is measured too.
        quick: Whether sizes and rounds are cut to take under a minute a part.
        path: Recipe of the part ``recipe``.
        changes: Overrides of that recipe's settings, as KEY=VALUE.
    """
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
        "recipe": lambda: recipe.measure(
            with_planned_precision(load_recipe(path, changes), Machines(1, 1, 0, device == "cpu")), device, log
        ),
    }


def main() -> None:
    """Parse the command line, measure and print the results."""
    parser = argparse.ArgumentParser(prog="scripts/bench/prior", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        help="attention, step, step-memory, quickstart, sampling, sampling-memory, recipe [all that suit the device]",
    )
    parser.add_argument(
        "--recipe", type=Path, help="recipe of the part recipe [recipes/1b.yaml, with --quick recipes/quickstart.yaml]"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe; repeatable"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    parser.add_argument("--no-peer", action="store_true", help="do not measure dalle-pytorch")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run smaller models for fewer rounds at batch 1, under a minute a part; write no file",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the results [benchmarks]")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()  # `dalle` does so on a CPU; it helps every contender
    recipe_path = options.recipe or Path("recipes") / ("quickstart.yaml" if options.quick else "1b.yaml")
    known = parts(options.device, not options.no_peer, options.quick, recipe_path, options.set)
    possible = [name for name in known if options.device == "cpu" or name not in CPU_PARTS]
    wanted = options.parts or [name for name in possible if options.device == "cuda" or name not in GPU_PARTS]
    for name in wanted:
        if name not in possible:
            parser.error(f"{name}: is no part that runs on {options.device}; choose from {', '.join(possible)}")
    path = options.out / ("prior.json" if options.device == "cpu" else "prior-gpu.json")
    results = json.loads(path.read_text()) if path.is_file() else {}
    for name in wanted:
        results[name] = {"machine": describe_machine(options.device), **known[name]()}
        if not options.quick:
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            path.with_suffix(".md").write_text(render(results))
    print(render({name: results[name] for name in wanted}))


if __name__ == "__main__":
    main()
