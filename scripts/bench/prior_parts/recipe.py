"""Measure training and sampling of a recipe's whole prior, usually on a GPU.

An update is rated by its share of the matmul peak, and sampling by its share of the memory bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dalle_cli.config.schema import Recipe, SamplingSettings
from dalle_cli.distributed.engine import Replicated
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import Prior, build_prior
from dalle_cli.prior.on_gpu import speed_up
from dalle_cli.prior.train import sample_work, set_precision
from dalle_cli.sampling.draw import sample_images
from dalle_cli.training.state import TrainingState
from dalle_cli.training.throughput import peak_tflops
from prior_parts.timing import Contender, median_seconds

Log = Callable[[str], None]
MICRO_BATCH, SAMPLES, ROUNDS = 8, 64, 3
STEP_GOAL, SAMPLING_GOAL = 0.5, 0.6
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**31}
"""Size of the copy that measures the memory bandwidth."""


def measure(recipe: Recipe, device: str, log: Log) -> dict[str, Any]:
    """Return a row for an update in the recipe's precision and a row for samples of one caption in bf16."""
    rows = [measure_step(recipe, device), measure_sampling(recipe, device, SAMPLES)]
    for row in rows:
        log("recipe  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    model = recipe.prior.model
    sizes = {"recipe": recipe.name, "layers": model.layers, "d_model": model.d_model, "grid": model.grid}
    return {"sizes": sizes, "rows": rows, "ratios": []}


def measure_step(recipe: Recipe, device: str, micro_batch: int = MICRO_BATCH) -> dict[str, Any]:
    """Time the forward and backward pass, clipping and optimizer on one micro-batch, and count the model's FLOPs."""
    stage = recipe.prior
    prior = build_prior(recipe)
    scaling = set_precision(prior, stage, 1)
    prior.to(device)
    if device == "cuda":
        speed_up(prior, recipe.compile, torch.device(device))
    state = TrainingState(Replicated(prior, scaling=scaling), stage, set(prior.decayed_parameters()))

    def update() -> None:
        state.optimizer.zero_grad()
        _loss(prior, micro_batch, device).backward()  # type: ignore[no-untyped-call]
        state.optimizer.step(1e-5)

    seconds = median_seconds({"update": Contender(update)}, ROUNDS, device)["update"]
    work = sample_work(recipe)
    peak = peak_tflops(work.dtype, torch.device(device))
    tflops = micro_batch * work.flops / seconds / 1e12
    return {
        "name": f"update, {stage.precision}",
        "batch": micro_batch,
        "seconds": seconds,
        "TFLOP/s": tflops,
        "share of the matmul peak": tflops / peak,
        "goal": STEP_GOAL,
    }


def _loss(prior: Prior, batch: int, device: str) -> Tensor:
    text = torch.zeros(batch, prior.text_length, dtype=torch.long, device=device)
    length = torch.full((batch,), prior.text_length)  # on the CPU, as in training
    found = prior.loss(text, length, torch.zeros(batch, prior.image_length, dtype=torch.long, device=device))
    return found.text / 8 + found.image * 7 / 8


def measure_sampling(recipe: Recipe, device: str, samples: int) -> dict[str, Any]:
    """Time ``samples`` images of one caption in bf16, and count the bytes that must be read."""
    prior = build_prior(recipe).to(device).eval().requires_grad_(False)
    decoder = Decoder(prior, "bf16")
    text_ids = torch.zeros(1, decoder.text_length, dtype=torch.long, device=device)
    uniforms = torch.rand(1, samples, decoder.image_length, dtype=torch.float64, device=device)

    def draw() -> None:
        sample_images(decoder, text_ids, uniforms, SamplingSettings(batch_size=samples))

    seconds = median_seconds({"images": Contender(draw)}, 1, device)["images"]
    read = bytes_read(decoder, samples)
    bandwidth = copy_bandwidth(device)
    return {
        "name": "samples, bf16",
        "batch": samples,
        "seconds": seconds,
        "images/s": samples / seconds,
        "GB read": read / 1e9,
        "GB/s of the memory": bandwidth / 1e9,
        "share of the bandwidth": read / bandwidth / seconds,
        "goal": SAMPLING_GOAL,
    }


def bytes_read(decoder: Decoder, samples: int) -> int:
    """Return the bytes read to draw ``samples`` images of one caption: all matrices and the cache at each step."""
    matrices = cached = 0
    steps = range(decoder.image_length - 1)
    for layer in decoder.layers:
        linears = (layer.qkv, layer.out, layer.up, layer.down)
        matrices += sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
        d_model = layer.out.weight.shape[0]
        slots = sum(len(range(*layer.slots.read(p).indices(layer.slots.count))) for p in steps)
        cached += 2 * d_model * decoder.dtype.itemsize * (decoder.text_length * len(steps) + samples * slots)
    matrices += decoder.head.weight.numel() * decoder.head.weight.element_size()
    return matrices * len(steps) + cached


def copy_bandwidth(device: str) -> float:
    """Return the bytes per second that the fastest of several copies reads and writes."""
    source = torch.zeros(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * len(source) / min(seconds)
