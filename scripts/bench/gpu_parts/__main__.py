"""Check results and speed on one GPU, part by part, each within its time."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prior_parts.report import describe_machine

from dalle_cli.distributed.device import prepare_process
from gpu_parts import agreement, speed
from gpu_parts.row import Row

PARTS: dict[str, tuple[Callable[[str, bool], Iterator[Row]], int]] = {
    "agreement": (agreement.measure, 120),
    "attention": (speed.measure_attention, 90),
    "training": (speed.measure_training, 90),
    "sampling": (speed.measure_sampling, 120),
    "dvae": (speed.measure_dvae, 60),
    "stack": (speed.measure_stack, 60),
    "dense": (speed.measure_dense, 120),
}
"""Each part, in order, and the seconds that it may take."""
QUICK = ("agreement", "training")
BUDGET, QUICK_BUDGET = 480, 120
"""Seconds for all parts together."""


def main() -> None:
    """Run the parts in processes of their own, so that one that fails or hangs leaves the others alone."""
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--tiny", action="store_true", help="use tiny models, to try the script itself")
    parser.add_argument("--quick", action="store_true", help=f"run only {' and '.join(QUICK)}, within two minutes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the results [benchmarks]")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = options.parts or (QUICK if options.quick else tuple(PARTS))
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"{', '.join(unknown)}: no such part; choose from {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; run it where there is one, or with --device cpu --tiny")
    if options.here:
        prepare_process(torch.device(options.device, 0 if options.device == "cuda" else None))
        for row in PARTS[wanted[0]][0](options.device, options.tiny):
            if options.tiny and wanted[0] != "agreement":  # the bounds are for true sizes
                row = replace(row, at_least=None, at_most=None)
            print(json.dumps(row.as_json()), flush=True)
        return
    card = torch.cuda.get_device_name() if options.device == "cuda" else "none"
    path = options.out / f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower())}.json"
    end, found = time.monotonic() + (QUICK_BUDGET if options.quick else BUDGET), {}
    for name in wanted:
        limit = min(PARTS[name][1], end - time.monotonic())
        found[name] = _run(name, options, limit) if limit > 5 else {"seconds": 0.0, "rows": [], "ended": "no time left"}
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"machine": {**describe_machine(options.device), "command": "scripts/gpu-check"}, "parts": found}
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(render(result))
    print(render(result))
    checked = found.get("agreement", {"rows": [], "ended": ""})
    sys.exit(bool(checked["ended"]) or any(row["met"] == "NO" for row in checked["rows"]))


def _run(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Return the rows that a part printed until it ended, and how it ended if not well."""
    command = [sys.executable, "-m", "gpu_parts", name, "--here", "--device", options.device]
    command += ["--tiny"] if options.tiny else []
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, error = process.communicate(timeout=limit)
        ended = "" if process.returncode == 0 else (error.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        ended = f"stopped after {limit:.0f} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    print(f"{name}: {len(rows)} figures in {time.monotonic() - began:.0f} s {ended}", file=sys.stderr, flush=True)
    return {"seconds": time.monotonic() - began, "rows": rows, "ended": ended}


def render(result: dict[str, Any]) -> str:
    """Return the results as a page of Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if key != "command")
    lines = ["# One GPU", "", f"Written by `{result['machine']['command']}`: {machine}.", ""]
    for name, part in result["parts"].items():
        lines += [f"## {name}", "", f"{part['seconds']:.0f} s. {part['ended']}".strip(), ""]
        if part["rows"]:
            lines += ["| what | figure | bound | met |", "|---|---|---|---|"]
            lines += [
                f"| {row['what']} | {row['figure']:.4g} {row['unit']} | {row['bound']} | {row['met']} |"
                for row in part["rows"]
            ]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
