"""Measure the peak memory of a training step on a CPU, each case in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dalle_cli.distributed.device import fast_matmul
from prior_parts import memory
from prior_parts.naive import make_naive, naive_loss
from prior_parts.peer import load_peer
from prior_parts.step import NAIVE, PEER, Sizes, build_ours, build_training_peer, draw_batch, step_of, training_loss

Log = Callable[[str], None]
CASES = ("dalle", "dalle, resblocks recomputed", NAIVE, PEER)


def measure(sizes: Sizes, log: Log) -> dict[str, Any]:
    """Return rows with the MB that two steps add to a process that has its model and a batch.

    Activations are what the steps add beyond gradients and Adam's moments; they include temporaries of the optimizer.
    """
    rows: list[dict[str, Any]] = []
    for batch in sizes.batches:
        for case in CASES:
            if case == PEER and load_peer() is None:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                start, peak, weights = pool.apply(_peak, (sizes, batch, case))
            rows.append({"batch": batch, "name": case, "model_mb": start, "step_mb": peak - start})
            rows[-1]["gradients_and_moments_mb"] = 3 * weights
            rows[-1]["activations_mb"] = peak - start - 3 * weights
            activations = rows[-1]["activations_mb"]
            log(f"memory  batch {batch}  {case:<30} {peak - start:8.0f} MB, {activations:.0f} MB of it activations")
    ratios = [
        {
            "batch": row["batch"],
            "ours": "activations of dalle",
            "peer": row["name"],
            "ratio": row["activations_mb"] / first["activations_mb"],
        }
        for row in rows
        for first in rows
        if first["batch"] == row["batch"] and first["name"] == "dalle" and row["name"] in CASES[2:]
    ]
    return {"sizes": asdict(sizes), "rows": rows, "ratios": ratios}


def _peak(sizes: Sizes, batch: int, case: str) -> tuple[float, float, float]:
    """Return the MB in use with the model and a batch, at the peak of two steps, and for the parameters alone."""
    text, length, image = draw_batch(sizes, batch, "cpu")
    if case == PEER:
        model: Any = build_training_peer(sizes, load_peer())
        step = step_of(model, lambda: model(text, image, return_loss=True))
    else:
        model = build_ours(sizes, checkpoint_resblocks="recomputed" in case)
        if case.startswith("dalle"):
            step = step_of(model, training_loss(model, text, length, image))
        else:
            make_naive(model)
            step = step_of(model, lambda: naive_loss(model, text, image))
    start = memory.reset_peak()
    with fast_matmul():
        step()
        step()
    return start, memory.peak(start), sum(p.nbytes for p in model.parameters() if p.requires_grad) / 2**20
