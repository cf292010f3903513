"""Peak memory of a training step on a CPU, each case in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dalle_cli.distributed.device import fast_matmul
from prior_parts import memory
from prior_parts.naive import make_naive, naive_loss
from prior_parts.peer import load_peer
from prior_parts.step import PEER, Sizes, build_ours, build_peer, draw_batch, ours, step_of

Log = Callable[[str], None]
CASES = ("dalle", "dalle, resblocks recomputed", "mask and whole logits", PEER)


def measure(sizes: Sizes, log: Log) -> dict[str, Any]:
    """Rows with the megabytes that two steps take beyond what the process held with its model and a batch.

    Activations are what they take beyond gradients and Adam's moments, so with the optimiser's temporaries.
    """
    rows: list[dict[str, Any]] = []
    for batch in sizes.batches:
        for case in CASES:
            if case == PEER and load_peer() is None:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                held, peak, own = pool.apply(_peak, (sizes, batch, case))
            rows.append({"batch": batch, "name": case, "model_mb": held, "step_mb": peak - held})
            rows[-1]["gradients_and_moments_mb"] = 3 * own
            rows[-1]["activations_mb"] = peak - held - 3 * own
            log(f"memory  batch {batch}  {case:<30} {peak - held:8.0f} MB, {peak - held - 3 * own:.0f} of activations")
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
    """Megabytes held with the model and a batch, at the peak of two steps, and of the parameters."""
    text, length, image = draw_batch(sizes, batch, "cpu")
    if case == PEER:
        model: Any = build_peer(sizes, load_peer())
        step = step_of(model, lambda: model(text, image, return_loss=True))
    else:
        model = build_ours(sizes, checkpoint_resblocks="recomputed" in case)
        if case.startswith("dalle"):
            step = step_of(model, ours(model, text, length, image))
        else:
            make_naive(model)
            step = step_of(model, lambda: naive_loss(model, text, image))
    held = memory.held()
    with fast_matmul():
        step()
        step()
    return held, memory.peak(), sum(p.nbytes for p in model.parameters() if p.requires_grad) / 2**20
