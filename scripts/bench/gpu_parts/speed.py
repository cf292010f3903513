"""Speed and memory of each stage at the sizes of the large recipes, as shares of what the device can do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from prior_parts import attention, recipe
from prior_parts.timing import Contender, median_seconds
from quality_parts.dense import Dense
from torch import nn
from torch.nn import functional as F

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import dvae_loss
from dalle_cli.planning.fit import check_fit
from dalle_cli.planning.memory import Machines
from dalle_cli.prior.counts import count_parameters
from dalle_cli.training.throughput import peak_tflops, training_flops
from gpu_parts.agreement import LOSS
from gpu_parts.row import Row

RECIPES = Path(__file__).parents[3] / "recipes"
TINY = [
    "image_size=64", "tokenizer.vocab_size=512", "tokenizer.text_length=16", "dvae.model.n_hid=16",
    "dvae.model.codebook_size=64", "prior.model.layers=2", "prior.model.heads=2", "prior.model.d_head=32",
    "prior.model.d_model=64", "prior.model.grid=8", "prior.powersgd.rank=0",
]  # fmt: skip
MICRO_BATCH, PICTURES = 8, 8


def _recipe(name: str, tiny: bool, *changes: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", [*(TINY if tiny else []), *changes])


def _silent(_line: str) -> None:
    """Print nothing."""


def measure_attention(device: str, tiny: bool) -> Iterator[Row]:
    """Yield the speed of each pattern, forward and backward, over other ways to compute it at the size of 1b."""
    sizes = (
        attention.Sizes(heads=2, d_head=16, grid=8, text_length=16, conv_kernel=5, batches=(1,), rounds=1)
        if tiny
        else attention.Sizes(heads=25, batches=(attention.GPU_BATCH,), rounds=5)
    )
    for ratio in attention.measure(sizes, device, _silent)["ratios"]:
        what = f"{ratio['ours']} over {ratio['peer']}, speed"
        yield Row(what, ratio["ratio"], "x", ratio.get("goal") if device == "cuda" else None)


def measure_training(device: str, tiny: bool) -> Iterator[Row]:
    """Yield the speed of an update of 1b, and its peak memory over the plan's."""
    wanted = _recipe("1b", tiny, f"prior.training.batch_size={MICRO_BATCH}", "prior.training.micro_batch=null")
    _reset_peak(device)
    found = recipe.measure_step(wanted, device)
    yield Row(f"1b, an update of {MICRO_BATCH}", found["seconds"], "s")
    tokens = wanted.tokenizer.text_length + wanted.grid**2
    yield Row("1b, training", MICRO_BATCH * tokens / found["seconds"], "tokens/s")
    yield Row("1b, training, share of the measured peak", found["share of the matmul peak"], "", recipe.STEP_GOAL)
    if device == "cuda":
        machines = Machines(1, 1, torch.cuda.get_device_properties(0).total_memory)
        planned = check_fit(wanted, count_parameters(wanted), machines).peak
        measured = torch.cuda.max_memory_allocated()
        yield Row("1b, peak memory", measured / 1e9, "GB")
        yield Row("1b, peak memory, off the plan by", abs(measured / planned - 1), "", None, 0.1)


def measure_sampling(device: str, tiny: bool) -> Iterator[Row]:
    """Yield the speed of sampling from 1b as a share of the floor that the memory's bandwidth sets."""
    for samples in (2,) if tiny else (64, 512):
        found = recipe.measure_sampling(_recipe("1b", tiny), device, samples)
        yield Row(f"1b, sampling {samples} at once", found["images/s"], "images/s")
        share = found["share of the bandwidth"]
        yield Row(f"1b, sampling {samples}, share of the bandwidth's floor", share, "", recipe.SAMPLING_GOAL)


def measure_dvae(device: str, tiny: bool) -> Iterator[Row]:
    """Yield the speed of training and encoding by the dVAE of full size, in bf16."""
    wanted = _recipe("dvae", tiny)
    model = DVAE(wanted.dvae.model).to(device)
    side, batch = wanted.image_size, 1 if tiny else PICTURES
    pictures = torch.randint(256, (batch, side, side, 3), device=device).to(torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generators = [torch.Generator(device).manual_seed(row) for row in range(batch)]

    def update() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = dvae_loss(model, pictures, LOSS, generators).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    x = torch.full((batch, 3, side, side), 0.5, device=device)

    @torch.no_grad()
    def encode() -> None:
        with torch.autocast(device, torch.bfloat16):
            model.encoder(x).argmax(1)

    seconds = median_seconds({"update": Contender(update), "encode": Contender(encode)}, 3, device)
    peak = peak_tflops(torch.bfloat16, torch.device(device))
    whole = training_flops(lambda: model.decoder(model.encoder(x).softmax(1)))
    encoder = training_flops(lambda: model.encoder(x)) / 3
    for name, key, flops in (("training", "update", whole), ("encoding", "encode", encoder)):
        yield Row(f"dVAE, {name}", batch / seconds[key], "pictures/s")
        yield Row(f"dVAE, {name}, share of the measured peak", flops / seconds[key] / 1e12 / peak)


def measure_stack(device: str, tiny: bool) -> Iterator[Row]:
    """Yield the memory that two further layers of 12b take in training, over the plan's."""
    peaks = {}
    for layers in (2, 4):
        sizes = [f"prior.model.layers={layers}", "prior.training.batch_size=1", "prior.training.micro_batch=null"]
        wanted = _recipe("12b", tiny, *sizes, "prior.sharding.zero=0", "prior.powersgd.rank=0")
        _reset_peak(device)
        seconds = recipe.measure_step(wanted, device, micro_batch=1)["seconds"]
        measured = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        planned = check_fit(wanted, count_parameters(wanted), Machines(1, 1, 2**40)).peak
        peaks[layers] = (seconds, measured, planned)
    more = [late - early for early, late in zip(peaks[2], peaks[4], strict=True)]
    yield Row("12b, a layer of one sample, time", more[0] / 2, "s")
    if device == "cuda":
        yield Row("12b, a layer whole on one GPU", more[1] / 2 / 1e9, "GB")
        yield Row("12b, a layer's memory, off the plan by", abs(more[1] / more[2] - 1), "", None, 0.1)


def measure_dense(device: str, tiny: bool) -> Iterator[Row]:
    """Yield the speed of a plain dense transformer of the size of 1b, by flash attention and ``torch.compile``."""
    wanted = _recipe("1b", tiny)
    seconds = _dense_seconds(wanted, device)
    _reset_peak(device)
    ours = recipe.measure_step(wanted, device)["seconds"]
    yield Row(f"a dense transformer of 1b's size, an update of {MICRO_BATCH}", seconds, "s")
    yield Row("1b, an update over the dense transformer's, speed", seconds / ours, "x", 1.0)


def _dense_seconds(wanted: Recipe, device: str) -> float:
    model, text = wanted.prior.model, wanted.tokenizer
    codes = wanted.dvae.model.codebook_size
    sizes = (model.d_model, model.heads, model.layers, text.text_length, wanted.grid**2, text.vocab_size, codes)
    dense = Dense(*sizes).to(device)
    forward: Callable[..., Any] = torch.compile(dense) if device == "cuda" else dense
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-5, fused=True)
    words = torch.zeros(MICRO_BATCH, text.text_length, dtype=torch.long, device=device)
    image = torch.zeros(MICRO_BATCH, wanted.grid**2, dtype=torch.long, device=device)

    def update() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(forward(words, image[:, :-1]).flatten(0, 1).float(), image.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(dense.parameters(), 4.0)
        optimizer.step()

    return median_seconds({"update": Contender(update)}, 3, device)["update"]


def _reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
