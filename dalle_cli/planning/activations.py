"""Memory of the prior's activations for one micro-batch, counted from the shapes of the tensors it allocates."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_cli.config.layout import AttentionKind
from dalle_cli.config.schema import Recipe
from dalle_cli.planning.memory import BYTES_16, BYTES_32
from dalle_cli.prior.attention import chunk_on_cpu, is_dense, windows_of
from dalle_cli.prior.head_loss import CHUNK as HEAD_CHUNK


@dataclass(frozen=True)
class BlockMemory:
    """Bytes that a resblock takes for one micro-batch."""

    saved: int
    """Tensors saved from the forward to the backward pass, the block's input included."""
    forward: int
    """Peak of the forward pass, besides ``saved``."""
    backward: int
    """Peak of the backward pass, ``stream`` included, besides ``saved`` and the gradients of weights."""
    stream: int
    """Gradient of the block's output, in 32 bit, plus its 16-bit copy if the block computes in 16 bit."""
    inference: int
    """Peak of a forward pass without a backward pass."""
    gradients: int
    """Gradients of all matrices of the block."""
    largest_gradient: int


@dataclass(frozen=True)
class Activations:
    """Activations of a micro-batch of ``batch`` samples."""

    recipe: Recipe
    batch: int
    on_cpu: bool

    @property
    def numbers(self) -> int:
        """Number of values in the residual stream."""
        return self.batch * (self.text + self.image) * self.recipe.prior.model.d_model

    @property
    def bytes(self) -> int:
        """Bytes of the residual stream, which is always in 32 bit."""
        return BYTES_32 * self.numbers

    @property
    def text(self) -> int:
        """Number of text positions."""
        return self.recipe.tokenizer.text_length

    @property
    def image(self) -> int:
        """Number of image positions."""
        return self.recipe.grid**2

    def resblocks(self) -> list[BlockMemory]:
        """Return the memory of each resblock, first to last."""
        model = self.recipe.prior.model
        kinds = model.attention_kinds()
        of_kind = {kind: self._attention_of(kind) for kind in dict.fromkeys(kinds)}
        mlp = self._mlp()
        return [block for kind in kinds for block in (of_kind[kind], mlp)]

    def head(self) -> int:
        """Return the peak of the loss (``prior/head_loss.py``), without the gradients of the unembeddings.

        It counts the normed stream, its image rows, the gradients of both heads' rows, and one chunk of logits. The
        number of text rows is the largest possible.
        """
        d, codes = self.recipe.prior.model.d_model, self.recipe.dvae.model.codebook_size
        rows_text, rows_image = self.batch * (self.text - 1), self.batch * self.image
        slice_rows = min(rows_image, max(1, HEAD_CHUNK // codes))
        return self.bytes + BYTES_32 * (d * (rows_text + 2 * rows_image) + slice_rows * codes)

    @property
    def _width(self) -> int:
        """Bytes of a value inside a resblock."""
        return BYTES_32 if self.recipe.prior.precision == "fp32" else BYTES_16

    @property
    def _inner(self) -> int:
        """Bytes of the residual stream in the precision of the resblocks."""
        return self._width * self.numbers

    @property
    def _cast(self) -> int:
        """Bytes of a 32-bit copy of the residual stream if resblocks compute in 16 bit, else 0."""
        return 0 if self._width == BYTES_32 else self.bytes

    @property
    def _stream_gradient(self) -> int:
        return self.bytes + (self._inner if self._cast else 0)

    def _norm(self) -> int:
        """Return the bytes saved by a layer norm, its input included, and by the input of the next linear layer."""
        return self.bytes + 2 * BYTES_32 * self.batch * (self.text + self.image) + self._inner

    def _mlp(self) -> BlockMemory:
        d, hidden, stream = self.recipe.prior.model.d_model, 4 * self._inner, self._stream_gradient
        return BlockMemory(
            saved=self._norm() + 2 * hidden,
            forward=self._cast + self._inner,
            backward=stream + hidden,
            stream=stream,
            inference=self.bytes + self._inner + 2 * hidden,
            gradients=8 * d**2 * self._width,
            largest_gradient=4 * d**2 * self._width,
        )

    def _attention_of(self, kind: AttentionKind) -> BlockMemory:
        if not self.on_cpu and kind == "column":
            return self._dense(copies=4)  # of queries, keys, values and the result, in the order of the other image
        return self._dense() if not self.on_cpu or is_dense(kind, self.recipe.prior.model.grid) else self._sparse(kind)

    def _dense(self, copies: int = 0) -> BlockMemory:
        sums = BYTES_32 * self.batch * self.recipe.prior.model.heads * (self.text + self.image)
        whole = self._inner
        return self._attention(
            saved=(4 + (copies > 0)) * whole + sums,
            forward=(1 + copies) * whole,
            backward=(7 + copies) * whole,
            inference=(4 + copies) * whole,
        )

    def _sparse(self, kind: AttentionKind) -> BlockMemory:
        """Return the memory of a sparse attention block, which on the CPU processes the batch in chunks."""
        model, length = self.recipe.prior.model, self.text + self.image
        windows, d_head = windows_of(kind, model.grid, model.conv_kernel), model.d_head
        weights = length * self.text + self.image * windows.keys
        samples, heads = chunk_on_cpu(self.batch, model.heads, weights) if self.on_cpu else (self.batch, model.heads)
        chunk = self._width * samples * heads
        # Values of one head's sequence, of its image positions, and of these copied to windows.
        whole, image, in_windows = length * d_head, self.image * d_head, windows.blocks * windows.keys * d_head
        cut = in_windows if windows.above else 0
        softmax = max(self.image * (self.text + windows.keys), 2 * self.text**2)
        mix = whole + image + cut
        spread = max(in_windows + image, image + whole) + self.text * d_head
        # A chunk's tensors are freed only after the next chunk's are allocated.
        previous = min(chunk, self._width * (self.batch * model.heads - samples * heads))
        return self._attention(
            # Queries, keys, values and the result; then the attention weights.
            saved=4 * self._inner + self._width * self.batch * model.heads * weights,
            forward=3 * self._inner + chunk * max(softmax, mix),
            # Gradients of the result, queries, keys and values; then a chunk's gradients and its attention weights.
            backward=4 * self._inner
            + chunk * (whole + weights)
            + max(chunk * max(mix, spread), chunk * cut + previous * weights),
            inference=4 * self._inner
            + previous * (3 * whole + weights)
            + chunk * (3 * whole + weights + max(softmax, mix)),
        )

    def _attention(self, saved: int, forward: int, backward: int, inference: int) -> BlockMemory:
        """Return the memory of a whole attention resblock, given the attention's own."""
        d, stream = self.recipe.prior.model.d_model, self._stream_gradient
        return BlockMemory(
            saved=self._norm() + saved,
            forward=forward,
            backward=stream + backward,
            stream=stream,
            inference=self.bytes + inference,
            gradients=4 * d**2 * self._width,
            largest_gradient=3 * d**2 * self._width,
        )
