"""Bytes of a micro-batch's activations on their way through the prior, counted from the shapes that the code makes.

Kept true, with the rest of a plan, by a test against the allocator's peak in real training.
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle_cli.config.layout import AttentionKind
from dalle_cli.config.schema import Recipe
from dalle_cli.planning.memory import BYTES_16, BYTES_32
from dalle_cli.prior.attention import chunk_on_cpu, is_dense, windows_of
from dalle_cli.prior.head_loss import CHUNK as HEAD_CHUNK


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
        as there can be.
        """
        d, codes = self.recipe.prior.model.d_model, self.recipe.dvae.model.codebook_size
        rows_text, rows_image = self.batch * (self.text - 1), self.batch * self.image
        at_once = min(rows_image, max(1, HEAD_CHUNK // codes))
        return self.bytes + BYTES_32 * (d * (rows_text + 2 * rows_image) + at_once * codes)

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
