"""The benchmark's results as a Markdown table, and the machine that they come from."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from dalle_cli.training.throughput import peak_tflops

COLUMNS = {
    "real": "real pictures",
    "rebuilt": "reconstructions",
    "single": "single sample",
    "best": "best of {n} by CLIP",
    "any": "any of {n}",
    "commonest": "always the commonest",
}
"""Heading of each kind of pictures."""


def describe_machine() -> dict[str, Any]:
    """Return the processor's cores, its rate of 32-bit matrix products in GFLOP/s, and the versions in use."""
    return {
        "cores": os.cpu_count(),
        "gflops": round(1000 * peak_tflops(torch.float32, torch.device("cpu"))),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def render(results: list[dict[str, Any]]) -> str:
    """Return the tables of some runs of the benchmark, one section for each."""
    return "\n".join(line for result in results for line in _section(result))


def _section(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    taken = ", ".join(f"{command} {seconds / 60:.1f}" for command, seconds in result["seconds"].items())
    headings = {key: heading.format(n=result["n"]) for key, heading in COLUMNS.items()}
    lines = [
        f"## {result['system']} on {result['data']}, {result['minutes']:g} minutes, seed {result['seed']}",
        "",
        f"`{result['command']}` on {machine['cores']} cores at {machine['gflops']} GFLOP/s in 32 bit, torch "
        f"{machine['torch']}. Minutes: {taken}. PSNR of the reconstructions: {result['psnr']:.2f} dB.",
        "",
    ]
    if result["right"]:
        rows = [[label, *(_share(shares.get(key)) for key in COLUMNS)] for label, shares in result["right"].items()]
        lines += _table(["share right", *headings.values()], rows)
    rows = [
        [headings[name], f"{found['fid']:.1f}", f"{1000 * found['kid']:.2f}", _number(found["precision"]),
         _number(found["recall"]), _share(result["found"][name]), _share(result["found_in_5"][name])]
        for name, found in result["distances"].items()
    ]  # fmt: skip
    lines += _table(["pictures", "FID", "KID x 1000", "precision", "recall", "caption found", "in 5"], rows)
    return lines + _sweep(result.get("sweep", [])) + _dense(result.get("dense"))


def _sweep(swept: list[dict[str, Any]]) -> list[str]:
    if not swept:
        return []
    labels = list(swept[0]["right"])
    rows = [
        [*(f"{found[name]:g}" for name in ("temperature", "top_p", "guidance")),
         *(_share(found["right"][label]) for label in labels), f"{1000 * found['kid']:.2f}"]
        for found in swept
    ]  # fmt: skip
    return _table(["temperature", "top-p", "guidance", *(f"{label} right" for label in labels), "KID x 1000"], rows)


def _dense(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    ours = found["ours"]
    rows = [
        ["ours", f"{ours['image']:.4f}", f"{ours['image_other_captions']:.4f}"],
        ["dense", f"{found['image_loss']:.4f}", f"{found['image_loss_other_captions']:.4f}"],
    ]
    return _table(["prior", "held-out image loss", "under other captions"], rows)


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)] + [""]


def _share(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['share']:.3f} ± {found['error']:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
