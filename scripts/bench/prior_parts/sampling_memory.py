"""Measure the peak memory of sampling, each case in a process of its own.

Sampling with our caches is compared with naive sampling, which recomputes all positions for each token. Only the last
tokens of an image are drawn, after a prefix of all others, so that the caches are full.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import asdict
from typing import Any, get_args

import torch

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.prior.cpu_kernels import Precision
from dalle_cli.prior.decode import Decoder
from dalle_cli.sampling.draw import draw_tokens, sample_images
from prior_parts import memory
from prior_parts.model import build_prior
from prior_parts.naive import make_naive
from prior_parts.sampling import MAX_UNCACHED_BATCH, Log, Sizes

UNCACHED = "masked attention, no cache"
LAST = 3
"""Number of tokens that are drawn."""


def measure(sizes: Sizes, log: Log) -> dict[str, Any]:
    """Return rows with the MB that sampling adds to a process that has its model."""
    rows: list[dict[str, Any]] = []
    for batch in sizes.batches:
        for precision in (*get_args(Precision), None):
            if precision is None and batch > MAX_UNCACHED_BATCH:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                start, peak = pool.apply(peak_memory, (sizes, precision, batch))
            name = f"dalle {precision}, caches" if precision else UNCACHED
            rows.append({"name": name, "batch": batch, "model_mb": start, "sampling_mb": peak - start})
            log(f"memory    batch {batch:>2}  {name:<42} {peak - start:>9.0f} MB beyond {start:.0f} MB with the model")
    uncached = {row["batch"]: row["sampling_mb"] for row in rows if row["name"] == UNCACHED}
    ratios = [
        {
            "batch": row["batch"],
            "ours": row["name"],
            "peer": UNCACHED,
            "ratio": uncached[row["batch"]] / row["sampling_mb"],
        }
        for row in rows
        if row["name"] != UNCACHED and row["batch"] in uncached
    ]
    return {"sizes": asdict(sizes), "rows": rows, "ratios": ratios}


def peak_memory(sizes: Sizes, precision: Precision | None, batch: int) -> tuple[float, float]:
    """Return the MB with the model ready and at the peak of sampling, which has no cache if ``precision`` is None."""
    prior = build_prior(sizes).eval().requires_grad_(False)
    text_ids = torch.arange(sizes.text_length)[None] % 100
    prefix = torch.zeros(1, sizes.image_length - LAST, dtype=torch.int64)
    uniforms = torch.rand(1, batch, sizes.image_length, dtype=torch.float64)
    if precision is None:
        make_naive(prior)
        start = memory.reset_peak()
        image = torch.zeros(batch, sizes.image_length, dtype=torch.int64)
        with torch.inference_mode():
            for position in range(sizes.image_length - LAST, sizes.image_length):
                logits = prior.image_logits(prior(text_ids.expand(batch, -1), image))[:, position]
                image[:, position] = draw_tokens(logits, uniforms[0, :, position])
    else:
        decoder = Decoder(prior, precision)
        del prior
        start = memory.reset_peak()
        sample_images(decoder, text_ids, uniforms, SamplingSettings(batch_size=batch), prefix)
    return start, memory.peak(start)
