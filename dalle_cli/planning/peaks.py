"""Peak memory of each phase of the prior's training, besides the training state that is always in memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from dalle_cli.config.schema import PriorSettings, Recipe
from dalle_cli.distributed.compression import Shape, compression_batches, factor_rank, shard_axis, shard_rank
from dalle_cli.distributed.deepspeed_engine import LIVE_NUMBERS
from dalle_cli.distributed.error_buffers import CHUNK as ERROR_CHUNK
from dalle_cli.distributed.group import BUCKET_BYTES
from dalle_cli.planning.activations import Activations
from dalle_cli.planning.memory import (
    BYTES_16,
    BYTES_32,
    Machines,
    StatePart,
    compressed_shapes,
    other_shards,
    shards_of,
    training_state,
    uses_powersgd,
)
from dalle_cli.precision.adam import CHUNK as ADAM_CHUNK
from dalle_cli.prior.counts import Counts

ADAM_WORK, ENCODING_WORK = 40, 23
"""Temporary bytes per value of a chunk in 16-bit Adam, and in the encoding of PowerSGD's state."""
FINITE_WORK = 3
"""Temporary bytes per value of a test for non-finite values, besides a copy of the value."""
GATHERED = 2
"""Number of resblocks whose weights ZeRO-3 gathers at a time: the current one and the next."""


@dataclass(frozen=True)
class Peaks:
    """Peak bytes per rank, besides weights, moments, EMA weights and PowerSGD's state."""

    saved: int
    """Activations saved from the forward to the backward pass."""
    passes: int
    """Peak of the forward and backward pass, gradients included."""
    update: int
    """Peak of the gradients' reduction and the update of weights, moments and EMA, gradients included."""
    validation: int
    """Peak of validation, including the weights set aside while the EMA weights replace them."""


def phase_peaks(
    recipe: Recipe, counts: Counts, machines: Machines, batch: int, accumulates: bool, validated: int = 0
) -> Peaks:
    """Return the peak of each phase of training, for micro-batches of ``batch`` samples.

    ``accumulates`` says whether an update has several micro-batches. ``validated`` is the number of rows that
    validation scores at once, 0 without validation.
    """
    stage = recipe.prior
    parts = training_state(stage, counts, machines)
    activations = Activations(recipe, batch, machines.on_cpu)
    blocks = activations.resblocks()
    gathered = _gathered(recipe, counts, parts, max(block.gradients for block in blocks), machines.on_cpu)
    gradients = parts["gradients"].each if parts["gradients"].place == "device" else counts.small * BYTES_32
    in_buckets = _gradients_in_buckets(stage, machines)

    checkpointed = stage.model.checkpoint_resblocks
    saved = list(accumulate([activations.bytes if checkpointed else block.saved for block in blocks], initial=0))
    all_saved = saved[-1] + activations.bytes
    # In the backward pass saved activations shrink while gradients grow, unless the gradients are already allocated
    # since an earlier micro-batch, or stay in buckets from update to update.
    # With both, the earlier micro-batches add up beside the buckets.
    present = gradients if gathered.sent else (accumulates + in_buckets) * gradients
    if accumulates and gathered.gradients:
        present = BYTES_32 * counts.small + gathered.gradients
    candidates = [present + all_saved + activations.head() + gathered.head_gradients + gathered.at_head]
    grown = present or gathered.head_gradients // gathered.shards
    for block, earlier in zip(reversed(blocks), reversed(saved[:-1]), strict=True):
        own = gathered.sent + (block.largest_gradient if present else block.gradients)
        if gathered.shards > 1:
            own = block.gradients + gathered.block  # the latter is the copy sent to the other ranks
        recomputed = block.stream + block.forward if checkpointed else 0
        if not checkpointed:
            candidates.append(present + earlier + block.saved + block.forward + gathered.at_block)
        candidates.append(grown + own + earlier + block.saved + max(block.backward, recomputed) + gathered.at_block)
        grown += 0 if present else block.gradients // gathered.shards
    candidates.append(gradients + gathered.sent + 2 * activations.bytes)
    validation = 0
    if validated:
        score = Activations(recipe, validated, machines.on_cpu)
        blocks_peak = max(block.inference for block in score.resblocks()) + gathered.at_block
        replaced = 0 if parts["EMA weights"].place != "device" else parts["weights"].each
        validation = replaced + max(blocks_peak, score.head() + gathered.at_head)
        validation += gradients if in_buckets or gathered.sent else 0
    return Peaks(all_saved, max(candidates), gradients + _update_work(stage, counts, machines), validation)


@dataclass(frozen=True)
class _Gathered:
    """Bytes of unsharded parameters and gradients under ZeRO; without it only ``head_gradients`` and ``block``."""

    shards: int
    """Number of ranks that share one copy of the model."""
    at_head: int
    """Weights gathered during the loss, besides the rank's own shards."""
    at_block: int
    """Weights gathered during a resblock, besides the rank's own shards."""
    head_gradients: int
    """Gradients of the unembeddings."""
    gradients: int
    """Unsharded gradients, summed over the micro-batches of an update."""
    block: int
    """Copy of the gradients of the largest resblock that is sent, and of a matrix that is split along its columns."""
    sent: int = 0
    """Copies of a bucket of gradients that are sent by DeepSpeed's ZeRO 3, whose own gradients stay allocated."""


def _gathered(recipe: Recipe, counts: Counts, parts: dict[str, StatePart], block: int, on_cpu: bool) -> _Gathered:
    weights, zero = parts["weights"], recipe.prior.sharding.zero
    classes = recipe.tokenizer.vocab_size + 1 + recipe.dvae.model.codebook_size
    heads = BYTES_32 * recipe.prior.model.d_model * classes
    if recipe.prior.sharding.engine == "deepspeed":
        cast = 0 if recipe.prior.precision == "fp32" else block
        if zero < 3:
            return _Gathered(1, 0, cast, heads, 0, block)
        # A rank that holds the model alone computes with the weights where they are.
        in_place = weights.shards == 1 and (on_cpu or weights.place == "device")
        live = 0 if in_place else BYTES_32 * min(LIVE_NUMBERS, counts.total)
        # The gradients in a bucket are arranged by rank in a copy, of which gloo makes another.
        sent = (2 if on_cpu else 1) * parts["bucket of gradients"].each
        return _Gathered(1, live, live + cast, heads, 0, block, sent)
    if weights.shards == 1:
        return _Gathered(1, 0, 0, heads, 0, block)
    width = BYTES_32 if recipe.prior.precision == "fp32" else BYTES_16
    split = [rows * columns for rows, columns in counts.matrices if shard_axis((rows, columns), weights.shards)]
    joined = width * max(split, default=0)
    if zero < 3:
        sharded = weights.whole - weights.small
        held = sharded if zero == 1 else 0
        return _Gathered(weights.shards, sharded, sharded + block, heads, held, block + joined)
    others = BYTES_32 * (counts.other - counts.small)
    return _Gathered(weights.shards, others, others - heads + GATHERED * block, heads, 0, block + joined)


def _update_work(stage: PriorSettings, counts: Counts, machines: Machines) -> int:
    """Return the temporary bytes of an update, besides gradients."""
    shards = shards_of(stage, machines)
    if stage.sharding.engine == "deepspeed":
        # A copy of the gradients of one group of parameters, those with weight decay or those without.
        on_device = machines.on_cpu or stage.sharding.offload == "none"
        return BYTES_32 * max(counts.effective, counts.other) // shards if on_device else 0
    matrices = [-(-rows * columns // shards) for rows, columns in counts.matrices]
    others = other_shards(stage, counts, shards)
    width, work = BYTES_32 if stage.precision == "fp32" else BYTES_16, [0]
    if stage.precision != "fp32":
        work.append(ADAM_WORK * min(ADAM_CHUNK, max(matrices + others)))
        if stage.training.ema_every == 1 or machines.on_cpu:
            work.append(BYTES_32 * max(matrices))  # the EMA converts a matrix to 32 bit
    if _gradients_in_buckets(stage, machines):
        return max(work)
    if machines.processes > 1:
        work.append(_buckets([BYTES_32 * counts.small]))
    if machines.processes > shards and not uses_powersgd(stage, machines):
        work.append(_buckets([*(width * number for number in matrices), *(BYTES_32 * number for number in others)]))
    if uses_powersgd(stage, machines):
        work.append(max((width + FINITE_WORK) * max(matrices), (BYTES_32 + FINITE_WORK) * max(others)))
        work.append(_buckets([BYTES_32 * number for number in others]))
        shapes = compressed_shapes(stage, counts, shards)
        work += [_powersgd_work(stage, machines, shapes[together], shards) for together in compression_batches(shapes)]
    return max(work)


def _gradients_in_buckets(stage: PriorSettings, machines: Machines) -> bool:
    """Return whether DistributedDataParallel holds the gradients, in buckets that it keeps."""
    return stage.sharding.engine == "fsdp" and not stage.sharding.zero and machines.processes > 1


def _buckets(sizes: list[int]) -> int:
    """Return the bytes of communication buffers for tensors of ``sizes`` bytes: a bucket and the next one."""
    return min(sum(sizes), 2 * max(BUCKET_BYTES, *sizes))


def _powersgd_work(stage: PriorSettings, machines: Machines, shapes: list[Shape], shards: int) -> int:
    """Return the bytes that PowerSGD takes to compress one batch of matrices (``distributed/power_sgd.py``).

    They hold the sums of gradients and error buffers, the factors before, during and after sending, and a matrix's
    reconstruction.
    """
    rank = shard_rank(stage.powersgd.rank, shards)
    numbers = [rows * columns for rows, columns in shapes]
    factors = [[BYTES_32 * shape[side] * factor_rank(shape, rank) for shape in shapes] for side in (0, 1)]
    left, right = map(sum, factors)
    in_16_bit = stage.precision != "fp32"
    encoding = ENCODING_WORK * min(ERROR_CHUNK, max(numbers)) if in_16_bit else 0
    left_sent, right_sent = (_as_codes(sizes) if in_16_bit else 0 for sizes in factors)
    # In 32 bit the sums become the error buffers in place, unless the buffers are on the host.
    on_device = machines.on_cpu or stage.powersgd.offload == "none"
    sums = 0 if stage.powersgd.error_feedback and not in_16_bit and on_device else BYTES_32 * sum(numbers)
    steps = (2 * left + max(left, left_sent), left + 2 * right + max(encoding, right_sent, BYTES_32 * max(numbers)))
    return sums + max(encoding, *steps)


def _as_codes(sizes: list[int]) -> int:
    """Return the bytes that float32 factors of ``sizes`` bytes take while they are sent in 16 bit.

    The 16-bit codes sent and received take as much as a message's float32 values; rounding adds temporary memory.
    """
    message = min(sum(sizes), max(BUCKET_BYTES, *sizes))
    return message + ENCODING_WORK * min(ERROR_CHUNK, message // BYTES_32)
