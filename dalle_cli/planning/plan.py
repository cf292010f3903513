"""The plan of ``dalle plan``: memory, traffic, time and cost of training a recipe's prior on given nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from dalle_cli.config.schema import Recipe
from dalle_cli.planning.cost import Assumptions, CheckpointCost, TrainingTime, checkpoint_cost, training_time
from dalle_cli.planning.fit import RESERVE, Fit, Suggestion, check_fit, suggest_settings, with_planned_precision
from dalle_cli.planning.memory import Machines, StatePart
from dalle_cli.planning.traffic import Traffic, between_machines
from dalle_cli.prior.counts import count_parameters


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of the prior."""

    total: int
    effective: int
    """Parameters in the matrices of the resblocks."""
    other: int
    closed_form_effective: int
    """The paper's formula for ``effective``, 12 d^2 per layer."""


@dataclass(frozen=True)
class Settings:
    """Settings of the recipe that decide memory and traffic."""

    precision: str
    engine: str
    zero: int
    offload: str
    node_size: int | None
    checkpoint_resblocks: bool
    powersgd_rank: int


@dataclass(frozen=True)
class Batch:
    """Samples of an update."""

    samples: int
    a_process: int
    """Samples per rank."""
    micro_batch: int
    tokens_a_sample: int


@dataclass(frozen=True)
class Memory:
    """Memory of training, in bytes per rank unless said otherwise."""

    parts: dict[str, StatePart]
    activations_kept: int
    """Activations saved from the forward to the backward pass."""
    phases: dict[str, int]
    """Peak of each phase of training, by the phase's name."""
    peak: int
    peak_phase: str
    memory: int
    usable: int
    """Memory without the reserve."""
    fits: bool
    host_a_machine: int
    """Bytes of host memory per node."""
    disk_a_machine: int
    """Bytes on each node's NVMe disk."""


@dataclass(frozen=True)
class Change:
    """Changes with which the recipe fits or, if none were found, comes closest."""

    fits: bool
    set: list[str]
    """Command-line options."""
    gpus_per_node: int
    peak: int
    peak_phase: str
    host_a_machine: int


@dataclass(frozen=True)
class Plan:
    """A whole plan, with sizes in bytes and times in seconds unless named otherwise."""

    what: str = field(default="plan", init=False)
    recipe: str
    machines: Machines
    parameters: Parameters
    settings: Settings
    batch: Batch
    memory: Memory
    change: Change | None
    """None if the recipe fits as it is."""
    between_machines: Traffic | None
    """None for a single node."""
    checkpoint: CheckpointCost
    time: TrainingTime | None
    """None where it can only be measured."""
    assumptions: list[str]


def plan(recipe: Recipe, machines: Machines, assumed: Assumptions, *, reckon_time: bool = True) -> Plan:
    """Plan the training of a recipe's prior.

    The time is not reckoned for machines without GPUs, of which ``assumed`` knows nothing, nor unless ``reckon_time``.

    Raises:
        UserError: the batch or the model cannot be split among that many ranks.
    """
    recipe = with_planned_precision(recipe, machines)
    stage, counts = recipe.prior, count_parameters(recipe)
    fit = check_fit(recipe, counts, machines)
    traffic = between_machines(stage, counts, machines, assumed.interconnect)
    time = None
    if reckon_time and not machines.on_cpu:
        time = training_time(recipe, counts, machines, assumed, traffic.seconds.sent or 0.0)
    return Plan(
        recipe=recipe.name,
        machines=machines,
        parameters=Parameters(
            counts.total, counts.effective, counts.other, 12 * stage.model.d_model**2 * stage.model.layers
        ),
        settings=Settings(
            precision=stage.precision,
            engine=stage.sharding.engine,
            zero=stage.sharding.zero,
            offload=stage.sharding.offload,
            node_size=stage.sharding.node_size,
            checkpoint_resblocks=stage.model.checkpoint_resblocks,
            powersgd_rank=stage.powersgd.rank,
        ),
        batch=Batch(
            samples=stage.training.batch_size,
            a_process=fit.samples,
            micro_batch=fit.micro_batch,
            tokens_a_sample=recipe.tokenizer.text_length + recipe.grid**2,
        ),
        memory=_memory(fit, machines),
        change=None if fit.fits else _change(suggest_settings(recipe, counts, machines)),
        between_machines=None if machines.nodes == 1 else traffic,
        checkpoint=checkpoint_cost(stage, counts, machines, assumed.disk, None if time is None else time.step_seconds),
        time=time,
        assumptions=_assumptions(machines, assumed, timed=time is not None),
    )


def _memory(fit: Fit, machines: Machines) -> Memory:
    return Memory(
        parts=fit.parts,
        activations_kept=fit.peaks.saved,
        phases=fit.phases,
        peak=fit.peak,
        peak_phase=fit.peak_phase,
        memory=machines.memory,
        usable=fit.usable,
        fits=fit.fits,
        host_a_machine=machines.gpus * fit.on_host,
        disk_a_machine=machines.gpus * fit.on_disk,
    )


def _change(suggestion: Suggestion) -> Change:
    fit, gpus = suggestion.fit, suggestion.machines.gpus
    return Change(fit.fits, suggestion.options(), gpus, fit.peak, fit.peak_phase, gpus * fit.on_host)


def _assumptions(machines: Machines, assumed: Assumptions, *, timed: bool) -> list[str]:
    """Return the plan's assumptions as sentences."""
    device = "processes" if machines.on_cpu else "GPUs"
    link = (
        f"each machine's link carries {assumed.interconnect / 1e9:g} Gbit/s each way (--interconnect), and gradients "
        "cross it after the backward pass, in a ring all-reduce"
        if assumed.interconnect is not None
        else "traffic between machines takes no time here; --interconnect adds it"
    )
    rate = [
        f"a GPU does {assumed.peak_flops / 1e12:g} TFLOP/s at its peak (--peak-tflops), and training reaches "
        f"{assumed.share:.0%} of that (--share)",
        "this share covers traffic inside a machine and to its host, reading data, and validation",
    ]
    return [
        *(rate if timed else []),
        *([link] if timed and machines.nodes > 1 else []),
        f"each machine writes its part of a checkpoint at {assumed.disk / 1e9:g} GB/s (--disk), and training waits",
        f"{RESERVE:.0%} of memory is reserved for what is not counted: GPU contexts, library buffers, fragmentation",
        f"captions fill all text positions, and all {device} get equally many samples",
        *([f"a GPU costs {assumed.price:g} an hour (--price)"] if timed and assumed.price is not None else []),
    ]
