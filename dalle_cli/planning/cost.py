"""Time and cost of the prior's training, from FLOPs, traffic and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dalle_cli.config.schema import PriorSettings, Recipe
from dalle_cli.planning.memory import BYTES_16, BYTES_32, Machines, training_state
from dalle_cli.prior.counts import Counts, count_flops

HOUR = 3600


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about the hardware; the defaults are for the paper's GPU, a V100."""

    peak_flops: float = 125e12
    """Peak FLOP/s of a GPU: the V100's in 16 bit, from its data sheet."""
    share: float = 0.3
    """Share of the peak that training reaches: a guess until it is measured."""
    interconnect: float | None = None
    """Bandwidth of a node's network link, in bits per second each way."""
    price: float | None = None
    """Price of a GPU for an hour."""
    disk: float = 1e9
    """Bytes per second at which a node writes a checkpoint: a guess."""


def assume(recipe: Recipe, peak_tflops: float | None = None, **given: Any) -> Assumptions:
    """Return the assumptions ``given``; the peak is the given one, else the recipe's, else the default."""
    peak = peak_tflops or recipe.monitoring.peak_tflops
    return Assumptions(**given) if peak is None else Assumptions(1e12 * peak, **given)


@dataclass(frozen=True)
class TrainingTime:
    """Time and cost of training, without checkpoints."""

    model_flops: int
    """FLOPs of an update, without recomputation."""
    recomputed_flops: int
    """FLOPs of recomputation in an update."""
    compute_seconds: float
    """Seconds of an update, without traffic between nodes."""
    step_seconds: float
    """Seconds of an update, traffic included."""
    tokens_per_second: float
    mfu: float
    updates: int
    hours: float
    gpu_hours: float
    cost: float | None
    """Price of all GPU hours; None without a price."""


def training_time(
    recipe: Recipe, counts: Counts, machines: Machines, assumed: Assumptions, traffic_seconds: float
) -> TrainingTime:
    """Return the time and cost of training; each update spends ``traffic_seconds`` on gradients between nodes."""
    training, flops = recipe.prior.training, count_flops(recipe, counts)
    samples = -(-training.batch_size // machines.processes)
    compute = samples * flops.executed / (assumed.peak_flops * assumed.share)
    step = compute + traffic_seconds
    hours = training.updates * step / HOUR
    tokens = recipe.tokenizer.text_length + recipe.grid**2
    return TrainingTime(
        model_flops=training.batch_size * flops.model,
        recomputed_flops=training.batch_size * (flops.executed - flops.model),
        compute_seconds=compute,
        step_seconds=step,
        tokens_per_second=training.batch_size * tokens / step,
        mfu=training.batch_size * flops.model / (step * machines.processes * assumed.peak_flops),
        updates=training.updates,
        hours=hours,
        gpu_hours=machines.processes * hours,
        cost=None if assumed.price is None else assumed.price * machines.processes * hours,
    )


@dataclass(frozen=True)
class CheckpointCost:
    """Bytes and time of a checkpoint."""

    bytes: int
    model: int
    """Bytes of weights, EMA weights, moments and PowerSGD's summed errors, which the first node writes."""
    each_process: int
    """Bytes of PowerSGD's factors that each rank writes."""
    first_machine: int
    """Bytes that the first node writes, the most of all nodes."""
    seconds: float
    """Seconds that training waits for a checkpoint."""
    every_updates: int
    share: float | None
    """Share of the training time that is spent on checkpoints; None if that time is unknown."""


def checkpoint_cost(
    stage: PriorSettings, counts: Counts, machines: Machines, disk: float, step_seconds: float | None
) -> CheckpointCost:
    """Return the cost of a checkpoint. All nodes write at once, at ``disk`` bytes per second; training waits for all.

    ``step_seconds`` is the time of an update, None if it is unknown.
    """
    parts = training_state(stage, counts, machines)
    model = sum(parts[name].whole for name in ("weights", "EMA weights", "moments"))
    if "PowerSGD error buffers" in parts:
        in_16 = parts["PowerSGD error buffers"].in_16
        model += (BYTES_16 if in_16 else BYTES_32) * counts.effective
    each = parts["PowerSGD factors"].each if "PowerSGD factors" in parts and stage.powersgd.warm_start else 0
    first = model + machines.gpus * each
    seconds, every = first / disk, stage.training.save_every
    return CheckpointCost(
        bytes=model + machines.processes * each,
        model=model,
        each_process=each,
        first_machine=first,
        seconds=seconds,
        every_updates=every,
        share=None if step_seconds is None else seconds / (seconds + every * step_seconds),
    )
