"""What training the prior holds in memory, counted from the shapes that the code makes.

Nothing is allocated or run: sizes follow from the recipe alone, so that a plan of the largest prior takes no time. Kept
true by a test against the allocator's peak in real training.

Counted are tensors. Not counted, and left to a reserve: Python and its libraries, a GPU's context, the buffers of
matrix and communication libraries, what an allocator loses to fragments, token batches read ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from dalle_cli.distributed.compression import factor_rank, is_compressed, shard_rank, shard_shape
from dalle_cli.precision.adam import CHUNK as ADAM_CHUNK
from dalle_cli.prior.attention import chunk_on_cpu, is_dense, windows_of
from dalle_cli.prior.head_loss import CHUNK as HEAD_CHUNK
from dalle_cli.prior.transformer import Prior
from dalle_cli.recipes.layout import AttentionKind
from dalle_cli.recipes.schema import PriorSettings, Recipe
from dalle_cli.training.parallel import BUCKET

BYTES_16, BYTES_32 = 2, 4
ADAM_WORK = 61
"""Bytes that Adam in 16 bit takes for each value that it works on."""
GATHERED = 2
"""Resblocks whose weights ZeRO-3 holds whole at a time: the one at work and the next."""


@dataclass(frozen=True)
class Counts:
    """Numbers of the prior's parameters.

    ``matrices`` are those of the resblocks, (out, in), held in the recipe's precision and compressed by PowerSGD. All
    others are in 32 bit: ``small`` are the resblocks' gains and biases, whole on every process, ``others`` embeddings,
    unembeddings and the last gain.
    """

    matrices: tuple[tuple[int, int], ...]
    small: int
    others: tuple[int, ...]

    @property
    def effective(self) -> int:
        """What the paper's table of models counts: the numbers of the matrices, 12 d^2 a layer."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def other(self) -> int:
        return self.small + sum(self.others)

    @property
    def total(self) -> int:
        return self.effective + self.other


def count_parameters(recipe: Recipe) -> Counts:
    """Counted on the model itself, built without storage."""
    with torch.device("meta"):
        prior = Prior(
            recipe.prior.model,
            recipe.tokenizer.text_length,
            recipe.tokenizer.vocab_size,
            recipe.dvae.model.codebook_size,
        )
    matrices = prior.decayed_parameters()
    rest = {name: p.numel() for name, p in prior.named_parameters() if name not in matrices}
    small = sum(number for name, number in rest.items() if name.startswith("resblocks."))
    others = tuple(number for name, number in rest.items() if not name.startswith("resblocks."))
    return Counts(tuple((p.shape[0], p.shape[1]) for p in matrices.values()), small, others)


@dataclass(frozen=True)
class Machines:
    """``nodes`` machines of ``gpus`` processes each, with ``memory`` bytes a process. A process has a GPU, or with
    ``on_cpu`` its share of the machine's memory."""

    gpus: int
    nodes: int
    memory: int
    on_cpu: bool = False

    @property
    def world(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Held:
    """What stays in memory from update to update: bytes in 16 and in 32 bit, whole, and among how many processes they
    are split, but for those that are ``small`` parameters'."""

    in_16: int
    in_32: int
    small: int = 0
    shards: int = 1
    place: str = "device"

    @property
    def whole(self) -> int:
        return self.in_16 + self.in_32

    @property
    def each(self) -> int:
        """Bytes of one process."""
        return self.small + -(-(self.whole - self.small) // self.shards)


def held(stage: PriorSettings, counts: Counts, machines: Machines) -> dict[str, Held]:
    """Weights, gradients, Adam's moments, averaged weights and PowerSGD's state between two updates.

    As ``training/state.py``, ``precision/adam.py``, ``distributed/engine.py`` and ``distributed/power_sgd.py`` keep
    them.
    """
    shards = shards_of(stage, machines)
    offloads = stage.sharding.zero > 0 and machines.world > 1 and not machines.on_cpu
    place = "device" if stage.sharding.offload == "none" or not offloads else stage.sharding.offload
    small = BYTES_32 * counts.small
    in_16, in_32 = 0, BYTES_32 * counts.total
    if stage.precision != "fp32":
        in_16, in_32 = BYTES_16 * counts.effective, BYTES_32 * counts.other
    parts = {
        "weights": Held(in_16, in_32, small, shards, place),
        "gradients": Held(in_16, in_32, small, shards, place),
        "moments": Held(2 * in_16, 2 * in_32, 2 * small, shards, place),
        "average": Held(0, BYTES_32 * counts.total, small, shards, place),
    }
    if uses_powersgd(stage, machines):
        shapes, rank = compressed(stage, counts, shards), shard_rank(stage.powersgd.rank, shards)
        if stage.powersgd.error_feedback:
            errors = BYTES_32 * sum(rows * columns for rows, columns in shapes)
            parts["PowerSGD's errors"] = Held(0, shards * errors, shards=shards)
        factors = BYTES_32 * sum(shape[1] * factor_rank(shape, rank) for shape in shapes)
        parts["PowerSGD's factors"] = Held(0, shards * factors, shards=shards)
    return parts


def shards_of(stage: PriorSettings, machines: Machines) -> int:
    """Processes that hold the model together."""
    return stage.sharding.node_size or machines.gpus if stage.sharding.zero else 1


def uses_powersgd(stage: PriorSettings, machines: Machines) -> bool:
    """Whether gradients cross between machines through factors: between groups of processes with shards."""
    return stage.powersgd.rank > 0 and stage.sharding.zero > 0 and machines.world > shards_of(stage, machines)


def compressed(stage: PriorSettings, counts: Counts, shards: int) -> list[tuple[int, int]]:
    """Shapes of a process's shards that go through PowerSGD's factors."""
    settings, rank = stage.powersgd, shard_rank(stage.powersgd.rank, shards)
    shapes = [shard_shape(matrix, shards) for matrix in counts.matrices]
    return [shape for shape in shapes if is_compressed(shape, rank, settings.min_compression)]


@dataclass(frozen=True)
class Pass:
    """Bytes of a resblock at work on a micro-batch."""

    kept: int
    """From its forward to its backward pass, its input among it."""
    forward: int
    """At most, beside what is kept."""
    backward: int
    """At most, beside what is kept and the gradients of weights; ``stream`` among it."""
    stream: int
    """The gradient at the block's end, in 32 bit and as the branch takes it."""
    alone: int
    """At most, where no backward pass follows."""
    gradients: int
    largest_gradient: int


@dataclass(frozen=True)
class Stream:
    """``batch`` samples on their way through the prior."""

    recipe: Recipe
    batch: int
    on_cpu: bool

    @property
    def numbers(self) -> int:
        """Of the residual stream."""
        return self.batch * (self.text + self.image) * self.recipe.prior.model.d_model

    @property
    def bytes(self) -> int:
        """Of the residual stream, always in 32 bit."""
        return BYTES_32 * self.numbers

    @property
    def text(self) -> int:
        return self.recipe.tokenizer.text_length

    @property
    def image(self) -> int:
        return self.recipe.grid**2

    def resblocks(self) -> list[Pass]:
        """All of them, first one first."""
        model = self.recipe.prior.model
        kinds = model.attention_kinds()
        of_kind = {
            kind: self._dense() if is_dense(kind, model.grid) else self._sparse(kind) for kind in dict.fromkeys(kinds)
        }
        mlp = self._mlp()
        return [block for kind in kinds for block in (of_kind[kind], mlp)]

    def head(self) -> int:
        """The loss at its peak, beside the gradients of the unembeddings (see ``prior/head_loss.py``): the normed
        stream, the image's rows of it, both heads' gradients of their rows, a slice of logits. As many text positions
        as there can be."""
        d, codes = self.recipe.prior.model.d_model, self.recipe.dvae.model.codebook_size
        rows_text, rows_image = self.batch * (self.text - 1), self.batch * self.image
        at_once = min(rows_image, max(1, HEAD_CHUNK // codes))
        return self.bytes + BYTES_32 * (d * (rows_text + 2 * rows_image + at_once) + at_once * codes)

    @property
    def _own(self) -> int:
        """Bytes of the stream as the inside of a resblock has it."""
        return self._width * self.numbers

    @property
    def _width(self) -> int:
        return BYTES_32 if self.recipe.prior.precision == "fp32" else BYTES_16

    @property
    def _cast(self) -> int:
        """Bytes of the stream in the other type, where the inside of a resblock has another."""
        return 0 if self._width == BYTES_32 else self.bytes

    def _norm(self) -> int:
        """What a layer norm keeps, its input among it, and the input of the linear layer behind it."""
        return self.bytes + 2 * BYTES_32 * self.batch * (self.text + self.image) + self._own

    def _mlp(self) -> Pass:
        d, inside = self.recipe.prior.model.d_model, 4 * self._own
        stream = self.bytes + (self._own if self._cast else 0)
        return Pass(
            kept=self._norm() + 2 * inside,
            forward=self._cast + self._own,
            backward=stream + inside,
            stream=stream,
            alone=self.bytes + self._own + 2 * inside,
            gradients=8 * d**2 * self._width,
            largest_gradient=4 * d**2 * self._width,
        )

    def _dense(self) -> Pass:
        sums = BYTES_32 * self.batch * self.recipe.prior.model.heads * (self.text + self.image)
        return self._attention(4 * self._own + sums, self._own, 7 * self._own, 4 * self._own)

    def _sparse(self, kind: AttentionKind) -> Pass:
        model, length = self.recipe.prior.model, self.text + self.image
        windows, side = windows_of(kind, model.grid, model.conv_kernel), model.d_head
        weights = length * self.text + self.image * windows.keys
        samples, heads = chunk_on_cpu(self.batch, model.heads, weights) if self.on_cpu else (self.batch, model.heads)
        part = self._width * samples * heads
        # Numbers of a stream, or of its part that stands in windows.
        whole, image, in_windows = length * side, self.image * side, windows.blocks * windows.keys * side
        cut = in_windows if windows.above else 0
        softmax = max(self.image * (self.text + windows.keys), 2 * self.text**2)
        mix = whole + image + cut
        spread = max(in_windows + image, image + whole) + self.text * side
        # What a part worked on is given up only once the next one's is there.
        last = min(part, self._width * (self.batch * model.heads - samples * heads))
        return self._attention(
            # Queries, keys, values, the result; the weights.
            kept=4 * self._own + self._width * self.batch * model.heads * weights,
            forward=3 * self._own + part * max(softmax, mix),
            # Gradients of the result and of queries, keys and values; a part's, with those of its weights.
            backward=4 * self._own
            + part * (whole + weights)
            + max(part * max(mix, spread), part * cut + last * weights),
            alone=4 * self._own + last * (3 * whole + weights) + part * (3 * whole + weights + max(softmax, mix)),
        )

    def _attention(self, kept: int, forward: int, backward: int, alone: int) -> Pass:
        d = self.recipe.prior.model.d_model
        stream = self.bytes + (self._own if self._cast else 0)
        return Pass(
            kept=self._norm() + kept,
            forward=forward,
            backward=stream + backward,
            stream=stream,
            alone=self.bytes + alone,
            gradients=4 * d**2 * self._width,
            largest_gradient=3 * d**2 * self._width,
        )


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
    """The most in a validation, with the weights that the averaged ones stand in for and the last gradients."""


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
        replaced = parts["weights"].each if parts["weights"].place == "device" else counts.small * BYTES_32
        validation = there + replaced + work
    return Peaks(end, max(moments), there + _update_work(stage, counts, machines), validation)


@dataclass(frozen=True)
class _Whole:
    """Bytes that ZeRO brings together for a while: of the weights besides a process's own ``at_head`` and
    ``at_block``, and of the gradients that add up over the micro-batches of an update."""

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
        work.append(BYTES_32 * max(matrices))  # a matrix in 32 bit on its way into the average
    if machines.world > 1:
        work.append(min(BUCKET, BYTES_32 * counts.small))
    if machines.world > shards and not uses_powersgd(stage, machines):
        largest, summed = max(width * max(matrices), BYTES_32 * max(others)), width * sum(matrices)
        work.append(max(largest, min(BUCKET, summed + BYTES_32 * sum(others))))
    if uses_powersgd(stage, machines):
        rank, shapes = shard_rank(stage.powersgd.rank, shards), compressed(stage, counts, shards)
        left, right = (BYTES_32 * sum(shape[side] * factor_rank(shape, rank) for shape in shapes) for side in (0, 1))
        product = BYTES_32 * max((rows * columns for rows, columns in shapes), default=0)
        copies = BYTES_32 * (sum(matrices) + sum(others))
        work.append(copies + max(3 * left, 2 * (left + right) + product))
    return max(work)
