"""Whether a prior's training fits given machines, what to change where it does not, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.planning.cost import HOUR, Assumptions, saving
from dalle_cli.planning.memory import Held, Machines, held, shards_of, uses_powersgd
from dalle_cli.planning.peaks import Peaks, peaks
from dalle_cli.planning.traffic import between_machines
from dalle_cli.prior.counts import Counts, count_flops, count_parameters
from dalle_cli.stores.held_out import VALIDATION_BATCH

RESERVE = 0.1
"""Of a process's memory that a plan leaves for what is not counted."""
MOST_GPUS = 1024
EMA_EVERY = 25
"""Updates from one step of the average to the next where it is proposed: the paper's (appendix E.2)."""

Value = bool | int | str


@dataclass(frozen=True)
class Fit:
    """A recipe on machines: bytes of a process in each phase of training, and which is the most."""

    parts: dict[str, Held]
    activations: Peaks
    samples: int
    """Of a process in an update."""
    micro_batch: int
    phases: dict[str, int]
    usable: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    def in_place(self, place: str) -> int:
        """Bytes of a process that stay on ``place`` from update to update."""
        return sum(part.each for part in self.parts.values() if part.place == place)


def fit(recipe: Recipe, counts: Counts, machines: Machines) -> Fit:
    """Work out the memory of ``recipe`` on ``machines``.

    Raises:
        UserError: there are more processes than samples in a batch, or they cannot be parted as the recipe says.
    """
    training, shards = recipe.prior.training, shards_of(recipe.prior, machines)
    if machines.world > training.batch_size:
        raise UserError(
            f"prior.training.batch_size: {training.batch_size} samples cannot be shared among {machines.world} "
            "processes; raise it, or start fewer"
        )
    if shards > 1 and training.batch_size % machines.world:
        raise UserError(
            f"prior.training.batch_size: {training.batch_size} samples are no multiple of the {machines.world} "
            "processes that share the model; set a multiple"
        )
    if machines.world % shards:
        raise UserError(
            f"prior.sharding.node_size: {machines.world} processes are no multiple of {shards}; set a divisor, or take "
            "more"
        )
    samples = -(-training.batch_size // machines.world)
    micro_batch = min(training.micro_batch or samples, samples)
    validated = min(training.micro_batch or VALIDATION_BATCH, training.validation_samples) if recipe.data.holdout else 0
    parts = held(recipe.prior, counts, machines)
    found = peaks(recipe, counts, machines, micro_batch, samples > micro_batch, validated)
    always = sum(part.each for name, part in parts.items() if part.place == "device" and name != "gradients")
    phases = {"forward and backward pass": always + found.passes, "update": always + found.update}
    if validated:
        phases["validation"] = always + found.validation
    return Fit(parts, found, samples, micro_batch, phases, int((1 - RESERVE) * machines.memory))


@dataclass(frozen=True)
class Mend:
    """Settings of the recipe, and machines, with which it fits, or comes nearest to it."""

    settings: dict[str, Value]
    machines: Machines
    fit: Fit

    def options(self) -> list[str]:
        """The settings as a command line has them."""
        return [f"--set {key}={str(value).lower()}" for key, value in self.settings.items()]


def mend(recipe: Recipe, counts: Counts, machines: Machines) -> Mend:
    """What to change so that the recipe fits: as few settings as do, cheap ones before dear ones.

    Where none do, machines of more GPUs are tried besides; the result may still not fit.
    """
    settings: dict[str, Value] = {}
    for key, value in _ladder(recipe, machines):
        settings[key] = value
        if _with(recipe, counts, machines, settings).fits:
            break
    else:
        return _larger_machines(recipe, counts, machines, settings)
    for key in list(settings):
        fewer = {other: value for other, value in settings.items() if other != key}
        if _with(recipe, counts, machines, fewer).fits:
            settings = fewer
    for key, value in _ladder(recipe, machines):
        # Of several values of one key, such as ever smaller micro-batches, the first that does.
        if key in settings and _with(recipe, counts, machines, {**settings, key: value}).fits:
            settings = {**settings, key: value}
            break
    return Mend(settings, machines, _with(recipe, counts, machines, settings))


def _larger_machines(recipe: Recipe, counts: Counts, machines: Machines, settings: dict[str, Value]) -> Mend:
    larger = machines
    while recipe.prior.sharding.zero and 2 * larger.world <= min(MOST_GPUS, recipe.prior.training.batch_size):
        larger = replace(larger, gpus=2 * larger.gpus)
        if (found := _with(recipe, counts, larger, settings)).fits:
            return Mend(settings, larger, found)
    return Mend(settings, machines, _with(recipe, counts, machines, settings))


def would_fit(recipe: Recipe, counts: Counts, memory: int) -> Mend | None:
    """The smallest single machine of GPUs of ``memory`` bytes on which the recipe trains without offloading, if it can
    do without, and what it must change there.
    """
    offloading = None
    gpus = recipe.prior.sharding.node_size or 1
    while gpus <= min(MOST_GPUS, recipe.prior.training.batch_size):
        machines = Machines(gpus, 1, memory)
        found = fit(recipe, counts, machines)
        result = Mend({}, machines, found) if found.fits else mend(recipe, counts, machines)
        if result.fit.fits and result.machines == machines:
            if "prior.sharding.offload" not in result.settings:
                return result
            offloading = offloading or result
        gpus *= 2
    return offloading


def _ladder(recipe: Recipe, machines: Machines) -> Iterator[tuple[str, Value]]:
    stage = recipe.prior
    if not stage.model.checkpoint_resblocks:
        yield "prior.model.checkpoint_resblocks", True
    batch = stage.training.batch_size
    size = min(stage.training.micro_batch or batch, -(-batch // machines.world))
    while size > 1:
        size = next(divisor for divisor in range(size // 2, 0, -1) if batch % divisor == 0)
        yield "prior.training.micro_batch", size
    if size == 1 and stage.training.micro_batch is None:
        yield "prior.training.micro_batch", 1  # of a validation too
    if machines.gpus > 1:
        for zero in range(stage.sharding.zero + 1, 4):
            yield "prior.sharding.zero", zero
    if not machines.on_cpu and stage.training.ema_every == 1 and stage.training.updates >= EMA_EVERY:
        yield "prior.training.ema_every", EMA_EVERY
    if not machines.on_cpu and uses_powersgd(stage, machines) and stage.powersgd.offload == "none":
        yield "prior.powersgd.offload", "cpu"
    if machines.gpus > 1 and not machines.on_cpu and stage.sharding.offload == "none":
        yield "prior.sharding.offload", "cpu"
    if stage.precision == "fp32":
        yield "prior.precision", "bf16"
    if stage.powersgd.rank and machines.nodes > 1:
        yield "prior.powersgd.rank", 0


def _with(recipe: Recipe, counts: Counts, machines: Machines, settings: dict[str, Value]) -> Fit:
    values = recipe.model_dump()
    for key, value in settings.items():
        *path, name = key.split(".")
        block = values
        for part in path:
            block = block[part]
        block[name] = value
    return fit(Recipe.model_validate(values), counts, machines)


def plan(recipe: Recipe, machines: Machines, assumed: Assumptions) -> dict[str, Any]:
    """Everything that ``dalle plan`` says, as plain values; bytes, seconds.

    Raises:
        UserError: as ``fit`` does.
    """
    counts = count_parameters(recipe)
    found = fit(recipe, counts, machines)
    stage = recipe.prior
    return {
        "what": "plan",
        "recipe": recipe.name,
        "machines": {**asdict(machines), "processes": machines.world},
        "parameters": {
            "total": counts.total,
            "effective": counts.effective,
            "other": counts.other,
            "closed_form_effective": 12 * stage.model.d_model**2 * stage.model.layers,
        },
        "settings": {
            "precision": stage.precision,
            **stage.sharding.model_dump(),
            "checkpoint_resblocks": stage.model.checkpoint_resblocks,
            "powersgd_rank": stage.powersgd.rank,
        },
        "batch": {
            "samples": stage.training.batch_size,
            "a_process": found.samples,
            "micro_batch": found.micro_batch,
            "tokens_a_sample": recipe.tokenizer.text_length + recipe.grid**2,
        },
        "memory": _memory(found, machines),
        "change": None if found.fits else _change(mend(recipe, counts, machines)),
        **_time(recipe, counts, machines, assumed),
        "assumptions": _assumptions(machines, assumed),
    }


def _memory(found: Fit, machines: Machines) -> dict[str, Any]:
    return {
        "parts": {name: {**asdict(part), "whole": part.whole, "each": part.each} for name, part in found.parts.items()},
        "activations_kept": found.activations.kept,
        "phases": found.phases,
        "peak": found.peak,
        "peak_phase": found.peak_phase,
        "memory": machines.memory,
        "usable": found.usable,
        "fits": found.fits,
        "host_a_machine": machines.gpus * found.in_place("cpu"),
        "nvme_a_machine": machines.gpus * found.in_place("nvme"),
    }


def _change(found: Mend) -> dict[str, Any]:
    return {
        "fits": found.fit.fits,
        "set": found.options(),
        "gpus_per_node": found.machines.gpus,
        "peak": found.fit.peak,
        "peak_phase": found.fit.peak_phase,
        "host_a_machine": found.machines.gpus * found.fit.in_place("cpu"),
    }


def _time(recipe: Recipe, counts: Counts, machines: Machines, assumed: Assumptions) -> dict[str, Any]:
    training, flops = recipe.prior.training, count_flops(recipe, counts)
    samples = -(-training.batch_size // machines.world)
    compute = samples * flops.executed / (assumed.peak_flops * assumed.share)
    traffic = between_machines(recipe.prior, counts, machines)
    on_link = {"whole": traffic.on_link(traffic.whole), "sent": traffic.on_link(traffic.sent)}
    seconds = {
        name: None if assumed.interconnect is None else 8 * size / assumed.interconnect
        for name, size in on_link.items()
    }
    step = compute + (seconds["sent"] or 0.0)
    saved = saving(recipe.prior, counts, machines)
    hours = training.updates * step / HOUR
    tokens = recipe.tokenizer.text_length + recipe.grid**2
    return {
        "between_machines": None if machines.nodes == 1 else {
            "a_process": {"whole": traffic.whole, "sent": traffic.sent},
            "a_machine_on_the_link": on_link,
            "seconds": seconds,
            "compression": 1 - traffic.sent / traffic.whole,
        },
        "checkpoint": {
            "bytes": saved.whole,
            "model": saved.model,
            "each_process": saved.own,
            "first_machine": saved.first_machine,
            "seconds": saved.seconds(assumed.disk),
            "every_updates": saved.every,
            "share": saved.share(assumed.disk, step),
        },
        "time": {
            "model_flops": training.batch_size * flops.model,
            "recomputed_flops": training.batch_size * (flops.executed - flops.model),
            "compute_seconds": compute,
            "step_seconds": step,
            "tokens_per_second": training.batch_size * tokens / step,
            "mfu": training.batch_size * flops.model / (step * machines.world * assumed.peak_flops),
            "updates": training.updates,
            "hours": hours,
            "gpu_hours": machines.world * hours,
            "cost": None if assumed.price is None else assumed.price * machines.world * hours,
        },
    }  # fmt: skip


def _assumptions(machines: Machines, assumed: Assumptions) -> list[str]:
    link = (
        f"machines are joined by {assumed.interconnect / 1e9:g} Gbit/s each, gradients cross in a ring after the "
        "backward pass (--interconnect)"
        if assumed.interconnect is not None
        else "the time between machines is left out: give --interconnect"
    )
    return [
        f"a GPU does {assumed.peak_flops / 1e12:g} TFLOP/s at its peak (--peak-tflops), and training "
        f"{assumed.share:.0%} of that (--share)",
        *([link] if machines.nodes > 1 else []),
        "the time of traffic inside a machine and to a host, of reading and validation is in that share",
        f"a machine writes checkpoints at {assumed.disk / 1e9:g} GB a second (--disk), and training waits for it",
        f"{RESERVE:.0%} of memory is left for what is no tensor of training: contexts, libraries' buffers, fragments",
        "captions fill all text positions; samples are shared evenly",
        *([f"a GPU costs {assumed.price:g} an hour (--price)"] if assumed.price is not None else []),
    ]
