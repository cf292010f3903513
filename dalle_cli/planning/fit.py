"""Check whether the prior's training fits into memory on given nodes, and find settings that make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import ValidationError

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.deepspeed_engine import refuse_few_stages
from dalle_cli.errors import UserError
from dalle_cli.planning.memory import Machines, StatePart, shards_of, training_state, uses_powersgd
from dalle_cli.planning.peaks import Peaks, phase_peaks
from dalle_cli.prior.counts import Counts
from dalle_cli.stores.held_out import VALIDATION_BATCH
from dalle_cli.training.precision_choice import with_precision

RESERVE = 0.1
"""Share of a rank's memory that a plan reserves for memory it does not count."""
MOST_GPUS = 1024
"""Largest number of GPUs to suggest."""
EMA_EVERY = 25
"""Suggested number of updates between steps of the EMA: the paper's (appendix E.2)."""

Value = bool | int | str


@dataclass(frozen=True)
class Fit:
    """Memory of a recipe's training, in bytes per rank."""

    parts: dict[str, StatePart]
    peaks: Peaks
    samples: int
    """Samples per rank in an update."""
    micro_batch: int
    phases: dict[str, int]
    """Peak of each phase of training, by the phase's name."""
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

    @property
    def on_host(self) -> int:
        """Bytes of the training state in the host's memory."""
        return self._in("cpu")

    @property
    def on_disk(self) -> int:
        """Bytes of the training state on the node's disk."""
        return self._in("nvme")

    def _in(self, place: str) -> int:
        return sum(part.each for part in self.parts.values() if part.place == place)


def with_planned_precision(recipe: Recipe, machines: Machines) -> Recipe:
    """Return the recipe with a precision to plan with in place of auto: bf16 on GPUs, else the larger fp32."""
    if recipe.prior.precision != "auto":
        return recipe
    return with_precision(recipe, "prior", "fp32" if machines.on_cpu else "bf16")


def check_fit(recipe: Recipe, counts: Counts, machines: Machines) -> Fit:
    """Compute the memory that a recipe's training takes.

    Raises:
        UserError: the batch or the model cannot be split among that many ranks, or the engine does not train so.
    """
    training, shards = recipe.prior.training, shards_of(recipe.prior, machines)
    if machines.processes > training.batch_size:
        raise UserError(
            f"prior.training.batch_size: {training.batch_size} samples cannot be shared among {machines.processes} "
            "processes; raise it, or start fewer"
        )
    if shards > 1 and training.batch_size % machines.processes:
        raise UserError(
            f"prior.training.batch_size: {training.batch_size} samples are no multiple of the {machines.processes} "
            "processes that share the model; set a multiple"
        )
    if machines.processes % shards:
        raise UserError(
            f"prior.sharding.node_size: {machines.processes} processes are no multiple of {shards}; set a divisor, or "
            "start more"
        )
    refuse_few_stages(recipe.prior.sharding, machines.processes // shards)
    samples = -(-training.batch_size // machines.processes)
    micro_batch = min(training.micro_batch or samples, samples)
    at_once = min(training.micro_batch or VALIDATION_BATCH, samples, training.validation_samples)
    validated = at_once if recipe.data.holds_out else 0
    parts = training_state(recipe.prior, counts, machines)
    peaks = phase_peaks(recipe, counts, machines, micro_batch, samples > micro_batch, validated)
    always = sum(part.each for name, part in parts.items() if part.place == "device" and name != "gradients")
    phases = {"forward and backward pass": always + peaks.passes, "update": always + peaks.update}
    if validated:
        phases["validation"] = always + peaks.validation
    return Fit(parts, peaks, samples, micro_batch, phases, int((1 - RESERVE) * machines.memory))


@dataclass(frozen=True)
class Suggestion:
    """Settings and nodes with which a recipe fits or, if none were found, comes closest."""

    settings: dict[str, Value]
    machines: Machines
    fit: Fit

    def options(self) -> list[str]:
        """Return the settings as command-line options."""
        return [f"--set {key}={str(value).lower()}" for key, value in self.settings.items()]


def suggest_settings(recipe: Recipe, counts: Counts, machines: Machines) -> Suggestion:
    """Find a small set of changed settings, cheap ones first, with which a recipe fits; if none, try more GPUs too."""
    settings: dict[str, Value] = {}
    for key, value in _candidates(recipe, machines):
        settings[key] = value
        if _fits_with(recipe, counts, machines, settings):
            break
    else:
        return _with_more_gpus(recipe, counts, machines, settings)
    for key in list(settings):
        fewer = {other: value for other, value in settings.items() if other != key}
        if _fits_with(recipe, counts, machines, fewer):
            settings = fewer
    # A key may have several values, such as smaller and smaller micro-batches: take the first that fits.
    for key, value in _candidates(recipe, machines):
        if key in settings and _fits_with(recipe, counts, machines, {**settings, key: value}):
            settings = {**settings, key: value}
            break
    return Suggestion(settings, machines, _check_with(recipe, counts, machines, settings))


def _with_more_gpus(recipe: Recipe, counts: Counts, machines: Machines, settings: dict[str, Value]) -> Suggestion:
    larger = machines
    while recipe.prior.sharding.zero and 2 * larger.processes <= min(MOST_GPUS, recipe.prior.training.batch_size):
        larger = replace(larger, gpus=2 * larger.gpus)
        if (found := _check_with(recipe, counts, larger, settings)).fits:
            return Suggestion(settings, larger, found)
    return Suggestion(settings, machines, _check_with(recipe, counts, machines, settings))


def suggest_machine(recipe: Recipe, counts: Counts, memory: int) -> Suggestion | None:
    """Find the smallest node, of GPUs with ``memory`` bytes, on which a recipe fits, and the settings to change.

    A node that needs no offloading is preferred to a smaller one that does.
    """
    offloading, recipe = None, with_planned_precision(recipe, Machines(1, 1, memory))
    gpus = recipe.prior.sharding.node_size or 1
    while gpus <= min(MOST_GPUS, recipe.prior.training.batch_size):
        machines = Machines(gpus, 1, memory)
        fit = check_fit(recipe, counts, machines)
        found = Suggestion({}, machines, fit) if fit.fits else suggest_settings(recipe, counts, machines)
        if found.fit.fits and found.machines == machines:
            if "prior.sharding.offload" not in found.settings:
                return found
            offloading = offloading or found
        gpus *= 2
    return offloading


def _candidates(recipe: Recipe, machines: Machines) -> Iterator[tuple[str, Value]]:
    """Yield settings that take less memory, cheap ones first."""
    stage = recipe.prior
    if not stage.model.checkpoint_resblocks:
        yield "prior.model.checkpoint_resblocks", True
    batch = stage.training.batch_size
    size = min(stage.training.micro_batch or batch, -(-batch // machines.processes))
    while size > 1:
        size = next(divisor for divisor in range(size // 2, 0, -1) if batch % divisor == 0)
        yield "prior.training.micro_batch", size
    if size == 1 and stage.training.micro_batch is None:
        yield "prior.training.micro_batch", 1  # this also sets the size of validation batches
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
    if machines.processes == 1 and not machines.on_cpu and stage.precision != "fp16":
        # What a single GPU cannot hold waits in the host's memory, by DeepSpeed.
        for zero in range(max(2, stage.sharding.zero), 4):
            yield "prior.sharding.zero", zero
            if stage.sharding.engine == "fsdp":
                yield "prior.sharding.engine", "deepspeed"
            if stage.sharding.offload == "none":
                yield "prior.sharding.offload", "cpu"
    if stage.powersgd.rank and machines.nodes > 1:
        yield "prior.powersgd.rank", 0


def _fits_with(recipe: Recipe, counts: Counts, machines: Machines, settings: dict[str, Value]) -> bool:
    """Return whether a recipe fits with ``settings``; it does not if they contradict one another."""
    try:
        return _check_with(recipe, counts, machines, settings).fits
    except ValidationError:
        return False


def _check_with(recipe: Recipe, counts: Counts, machines: Machines, settings: dict[str, Value]) -> Fit:
    values = recipe.model_dump()
    for key, value in settings.items():
        *path, name = key.split(".")
        block = values
        for part in path:
            block = block[part]
        block[name] = value
    return check_fit(Recipe.model_validate(values), counts, machines)
