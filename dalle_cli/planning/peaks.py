"""The most that training the prior holds in memory in each of its phases, beside what is always there.

Kept true by a test against the allocator's peak in real training.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from dalle_cli.config.schema import PriorSettings, Recipe
from dalle_cli.distributed.compression import Shape, factor_rank, shapes_together, shard_rank
from dalle_cli.distributed.error_buffers import CHUNK as KEPT_CHUNK
from dalle_cli.distributed.group import BUCKET
from dalle_cli.planning.activations import Stream
from dalle_cli.planning.memory import BYTES_16, BYTES_32, Held, Machines, compressed, held, shards_of, uses_powersgd
from dalle_cli.precision.adam import CHUNK as ADAM_CHUNK
from dalle_cli.prior.counts import Counts

ADAM_WORK, KEPT_WORK = 61, 41
"""Bytes that Adam in 16 bit, and encoding what PowerSGD keeps, take for each value that they work on."""
FINITE_WORK = 3
"""And looking whether a value is finite, beside a copy of it."""
GATHERED = 2
"""Resblocks whose weights ZeRO-3 holds whole at a time: the one at work and the next."""


@dataclass(frozen=True)
class Peaks:
    """Bytes of a process, beside weights, moments, average and PowerSGD's state, which are always there."""

    kept: int
    """Activations between forward and backward pass."""
    passes: int
    """The most in forward and backward pass, gradients among it."""
    update: int
    """The most while gradients are summed up, weights updated and averaged; gradients among it."""
    validation: int
    """The most in a validation, with the weights that the averaged ones stand in for."""


def peaks(
    recipe: Recipe, counts: Counts, machines: Machines, batch: int, accumulates: bool, validated: int = 0
) -> Peaks:
    """The phases of training.

    Args:
        batch: samples of a micro-batch.
        accumulates: whether an update takes several of them.
        validated: rows validated at once; 0 without validation.
    """
    stage = recipe.prior
    parts = held(stage, counts, machines)
    stream = Stream(recipe, batch, machines.on_cpu)
    blocks = stream.resblocks()
    whole = _Whole.of(recipe, counts, parts, max(block.gradients for block in blocks))
    there = parts["gradients"].each if parts["gradients"].place == "device" else counts.small * BYTES_32

    checkpointed = stage.model.checkpoint_resblocks
    kept = list(accumulate([stream.bytes if checkpointed else block.kept for block in blocks], initial=0))
    end = kept[-1] + stream.bytes
    # Backwards, what earlier blocks keep shrinks while later ones' gradients grow, unless those of an earlier
    # micro-batch are there from the start.
    present = there if accumulates else 0
    if accumulates and whole.gradients:
        present = BYTES_32 * counts.small + whole.gradients
    moments = [present + end + stream.head() + whole.head_gradients + whole.at_head]
    done = present or whole.head_gradients // whole.shards
    for block, earlier in zip(reversed(blocks), reversed(kept[:-1]), strict=True):
        own = block.largest_gradient if present else block.gradients
        if whole.shards > 1:
            own = block.gradients + whole.block  # and a copy on its way to the other processes
        again = block.stream + block.forward if checkpointed else 0
        if not checkpointed:
            moments.append(present + earlier + block.kept + block.forward + whole.at_block)
        moments.append(done + own + earlier + block.kept + max(block.backward, again) + whole.at_block)
        done += 0 if present else block.gradients // whole.shards
    moments.append(there + 2 * stream.bytes)
    validation = 0
    if validated:
        score = Stream(recipe, validated, machines.on_cpu)
        work = max(max(block.alone for block in score.resblocks()) + whole.at_block, score.head() + whole.at_head)
        replaced = 0 if parts["average"].place != "device" else parts["weights"].each
        validation = replaced + work
    return Peaks(end, max(moments), there + _update_work(stage, counts, machines), validation)


@dataclass(frozen=True)
class _Whole:
    """Bytes that ZeRO brings together for a while: of the weights besides a process's own ``at_head`` and
    ``at_block``, and of the gradients that add up over the micro-batches of an update.
    """

    shards: int
    at_head: int
    at_block: int
    head_gradients: int
    gradients: int
    block: int
    """Of the largest resblock's weights, and gradients."""

    @classmethod
    def of(cls, recipe: Recipe, counts: Counts, parts: dict[str, Held], block: int) -> _Whole:
        weights = parts["weights"]
        heads = recipe.tokenizer.vocab_size + 1 + recipe.dvae.model.codebook_size
        head = BYTES_32 * recipe.prior.model.d_model * heads
        if weights.shards == 1:
            return cls(1, 0, 0, head, 0, block)
        all_of_them = weights.whole - weights.small
        if recipe.prior.sharding.zero < 3:
            gradients = all_of_them if recipe.prior.sharding.zero == 1 else 0
            return cls(weights.shards, all_of_them, all_of_them + block, head, gradients, block)
        embeddings = BYTES_32 * sum(counts.others) - head
        return cls(weights.shards, embeddings + head, embeddings + GATHERED * block, head, 0, block)


def _update_work(stage: PriorSettings, counts: Counts, machines: Machines) -> int:
    """Bytes that an update takes for a while, beside gradients."""
    shards = shards_of(stage, machines)
    matrices = [-(-rows * columns // shards) for rows, columns in counts.matrices]
    others = [-(-number // shards) for number in counts.others]
    width, work = BYTES_32 if stage.precision == "fp32" else BYTES_16, [0]
    if stage.precision != "fp32":
        work.append(ADAM_WORK * min(ADAM_CHUNK, max(matrices + others)))
        if stage.training.ema_every == 1 or machines.on_cpu:
            work.append(BYTES_32 * max(matrices))  # a matrix in 32 bit on its way into the average
    if machines.world > 1:
        work.append(_messages([BYTES_32 * counts.small]))
    if machines.world > shards and not uses_powersgd(stage, machines):
        work.append(_messages([*(width * number for number in matrices), *(BYTES_32 * number for number in others)]))
    if uses_powersgd(stage, machines):
        work.append(max((width + FINITE_WORK) * max(matrices), (BYTES_32 + FINITE_WORK) * max(others)))
        work.append(_messages([BYTES_32 * number for number in others]))
        shapes = compressed(stage, counts, shards)
        work += [_powersgd_work(stage, machines, shapes[places], shards) for places in shapes_together(shapes)]
    return max(work)


def _messages(sizes: list[int]) -> int:
    """What tensors of ``sizes`` bytes take on their way to other processes: a message, and the one after it."""
    return min(sum(sizes), 2 * max(BUCKET, *sizes))


def _powersgd_work(stage: PriorSettings, machines: Machines, shapes: list[Shape], shards: int) -> int:
    """Of matrices that are compressed at a time (see ``distributed/power_sgd.py``): sums with what was not sent before,
    factors as they are, on their way and as they come back, the product of a matrix's.
    """
    rank, kept = shard_rank(stage.powersgd.rank, shards), stage.powersgd.error_feedback and stage.precision == "fp32"
    numbers = [rows * columns for rows, columns in shapes]
    factors = [[BYTES_32 * shape[side] * factor_rank(shape, rank) for shape in shapes] for side in (0, 1)]
    left, right = map(sum, factors)
    in_16_bit = stage.precision != "fp32"
    packed = KEPT_WORK * min(KEPT_CHUNK, max(numbers)) if in_16_bit else 0
    left_crosses, right_crosses = (_as_codes(sizes) if in_16_bit else 0 for sizes in factors)
    # In 32 bit the sums are what is kept, unless that is elsewhere.
    in_place = kept and (machines.on_cpu or stage.powersgd.offload == "none")
    sums = 0 if in_place else BYTES_32 * sum(numbers)
    steps = (2 * left + max(left, left_crosses), left + 2 * right + max(packed, right_crosses, BYTES_32 * max(numbers)))
    return sums + max(packed, *steps)


def _as_codes(sizes: list[int]) -> int:
    """What factors of ``sizes`` bytes take while they cross in 16 bit: of a message the codes, and those that come from
    other machines, together as much as its numbers; and the rounding.
    """
    message = min(sum(sizes), max(BUCKET, *sizes))
    return message + KEPT_WORK * min(KEPT_CHUNK, message // BYTES_32)
