"""Measure the peak memory of sampling, each case in a process of its own.

Sampling with our caches is compared with the naive way, which recomputes the whole stream by masked dense attention.
The last tokens of an image are drawn after a prefix of all others, so that the caches are full.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import asdict
from typing import Any

import torch

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.prior.cpu_kernels import Precision
from dalle_cli.prior.decode import Decoder
from dalle_cli.sampling.draw import draw_tokens, sample_images
from prior_parts import memory
from prior_parts.model import build_prior
from prior_parts.naive import make_naive
from prior_parts.sampling import ANEW_BATCH, Log, Sizes

ANEW = "mask, whole stream anew"
LAST = 3
"""Tokens drawn."""


def measure(sizes: Sizes, log: Log) -> dict[str, Any]:
    """Rows with the megabytes that sampling takes beyond what the process held with its model ready."""
    rows: list[dict[str, Any]] = []
    for batch in sizes.batches:
        for precision in ("fp32", "bf16", None):
            if precision is None and batch > ANEW_BATCH:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                held, peak = pool.apply(_peak, (sizes, precision, batch))
            name = f"dalle {precision}, caches" if precision else ANEW
            rows.append({"name": name, "batch": batch, "model_mb": held, "sampling_mb": peak - held})
            log(f"memory    batch {batch:>2}  {name:<42} {peak - held:>9.0f} MB beside {held:.0f} MB with the model")
    anew = {row["batch"]: row["sampling_mb"] for row in rows if row["name"] == ANEW}
    ratios = [
        {"batch": row["batch"], "ours": row["name"], "peer": ANEW, "ratio": anew[row["batch"]] / row["sampling_mb"]}
        for row in rows
        if row["name"] != ANEW and row["batch"] in anew
    ]
    return {"sizes": asdict(sizes), "rows": rows, "ratios": ratios}


def _peak(sizes: Sizes, precision: Precision | None, batch: int) -> tuple[float, float]:
    prior = build_prior(sizes).eval().requires_grad_(False)
    text_ids = torch.arange(sizes.text_length)[None] % 100
    prefix = torch.zeros(1, sizes.image_length - LAST, dtype=torch.int64)
    uniforms = torch.rand(1, batch, sizes.image_length, dtype=torch.float64)
    if precision is None:
        make_naive(prior)
        held = memory.held()
        image = torch.zeros(batch, sizes.image_length, dtype=torch.int64)
        with torch.inference_mode():
            for position in range(sizes.image_length - LAST, sizes.image_length):
                logits = prior.image_logits(prior(text_ids.expand(batch, -1), image))[:, position]
                image[:, position] = draw_tokens(logits, uniforms[0, :, position])
    else:
        decoder = Decoder(prior, precision)
        del prior
        held = memory.held()
        sample_images(decoder, text_ids, uniforms, SamplingSettings(batch_size=batch), prefix)
    return held, memory.peak()
