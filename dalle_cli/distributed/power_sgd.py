"""Gradients averaged between nodes through low-rank factors: PowerSGD (Vogels et al. 2019, arXiv 1905.13727).

For each matrix's gradient M, to which the node's error buffer has been added (their algorithms 1 and 2):

    P = M Q            averaged over the nodes, then orthonormalised
    Q = M^T P          averaged over the nodes
    every node updates by P Q^T, and its error buffer becomes its own M - P (M^T P)^T

As in the paper (Ramesh et al. 2021, section 2.5), each rank does this for its shard of the gradient, already averaged
within its node, together with the ranks that hold the same shard in the other nodes. P is orthonormalised by
Householder reflections, as there. They give an orthonormal basis even if P lacks full rank, so no small multiple of the
identity is added. The error buffers and factors of 16-bit gradients are stored and sent in 16 bit (appendix E.2), but
everything is computed in 32 bit. A few matrices are processed at a time, which bounds the temporary memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_cli.config.schema import PowerSgd
from dalle_cli.distributed.all_reduce_16bit import all_reduce_mean, decode, encode
from dalle_cli.distributed.compression import Shape, compression_batches, factor_rank, is_compressed, shard_rank
from dalle_cli.distributed.error_buffers import ErrorBuffers
from dalle_cli.distributed.group import buckets
from dalle_cli.precision.formats import MEAN
from dalle_cli.randomness import torch_generator


class _Matrix(NamedTuple):
    """A gradient that is divided by its scale and then compressed as an (M, N) matrix."""

    name: str
    gradient: Tensor
    shape: Shape
    scale: float

    @property
    def packed(self) -> bool:
        """True if its error buffer and factors are in 16 bit."""
        return self.gradient.dtype != torch.float32


class PowerSgdReducer:
    """Averages gradients over ``group``: matrices through low-rank factors, everything else whole.

    The caller passes the gradients of this rank's shards, averaged over its node and complete for the update.

    Args:
        settings: the recipe's ``prior.powersgd``.
        group: the ranks that hold the same shards, one in each node.
        columns: N of each parameter that is compressed, by name. Its shard is a matrix of rows of N numbers, the last
            one padded with zeros. Other parameters (embeddings, gains, biases) are sent whole.
        shards: the number of shards of a matrix, among which its rank is divided.
        seed: the seed of the initial Q and of the stochastic rounding of error buffers.
        device: the device for communication and computation; by default each gradient's.

    Attributes:
        bytes_sent: bytes that this rank has passed to ``group`` so far, padding included. With k nodes, 2 (k - 1) / k
            times as many leave the node, by a ring all-reduce as by ``all_reduce_mean``.
    """

    def __init__(
        self,
        settings: PowerSgd,
        group: dist.ProcessGroup,
        columns: Mapping[str, int],
        shards: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.settings, self.group, self.columns, self.seed, self.device = settings, group, columns, seed, device
        self.rank = shard_rank(settings.rank, shards)
        self.nodes, self.node = dist.get_world_size(group), dist.get_rank(group)
        self.bytes_sent = 0
        self._buffers = ErrorBuffers(on_host=settings.offload == "cpu")

    @torch.no_grad()
    def reduce(
        self, named: Iterable[tuple[str, Tensor]], update: int, scales: Mapping[str, float] | None = None
    ) -> None:
        """Replace each gradient, in 16 or 32 bit, by an approximation of its mean over the nodes.

        All ranks of the group must name the same gradients in the same order. All nodes get the same bytes, provided
        that their processors and libraries compute the same. If a compressed gradient is not finite, it and those
        compressed with it become NaN. A node's error buffer is cleared only if it is not finite itself; else it keeps
        the gradient that it was given (appendix E.2, step 12).

        Args:
            named: gradients with their parameters' names, without those of resblocks that skip the update.
            update: how many updates were done before.
            scales: the factor that each gradient was multiplied by, 1 by default. Error buffers are unscaled.
        """
        if self.nodes == 1:
            return
        scales = scales or {}
        whole: list[Tensor] = []
        matrices: list[_Matrix] = []
        for name, gradient in named:
            shape = self.matrix_shape(name, gradient) if update >= self.settings.start_update else None
            if shape is None:
                whole.append(gradient)
            else:
                matrices.append(_Matrix(name, gradient, shape, scales.get(name, 1.0)))
        for gradient, mean in self._means(whole):
            gradient.copy_(mean)
        for packed in (False, True):
            of_type = [matrix for matrix in matrices if matrix.packed == packed]
            for batch_slice in compression_batches([matrix.shape for matrix in of_type]):
                batch = of_type[batch_slice]
                if not self._reduce_matrices(batch, packed, update):
                    for matrix in batch:
                        matrix.gradient.fill_(torch.nan)

    def matrix_shape(self, name: str, gradient: Tensor) -> Shape | None:
        """Return the shape in which the shard ``gradient`` of ``name`` is compressed; None if it is sent whole."""
        if name not in self.columns or not gradient.numel():
            return None
        columns = self.columns[name]
        shape = (-(-gradient.numel() // columns), columns)
        return shape if is_compressed(shape, self.rank, self.settings.min_compression) else None

    def factor_shape(self, shape: Shape) -> Shape:
        """Return the shape of Q for a matrix of ``shape``."""
        return shape[1], factor_rank(shape, self.rank)

    @torch.no_grad()
    def share_errors(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Give every node an equal share of the nodes' summed errors, and yield the sums by name, for a checkpoint.

        ``shards`` are this rank's shards of the parameters, by name. The sum has a shard's shape, and is zero where the
        shard is sent whole. For 16-bit parameters it is in 1-6-9 codes (uint16).
        """
        if not self.settings.error_feedback:
            return
        for name in self.columns:
            if name not in shards:
                continue
            shard = shards[name]
            total = torch.zeros(shard.shape, device=self.device or shard.device)
            if (shape := self.matrix_shape(name, shard)) is not None:
                error = self._buffers.read(f"error.{name}", shape, total.device)
                if error is not None:
                    total.copy_(error.view(-1)[: shard.numel()].view_as(shard))
                self.bytes_sent += total.nbytes
                dist.all_reduce(total, group=self.group)
            saved = MEAN.encode(total) if shard.dtype != torch.float32 else total
            self.load_error(name, saved, shard)
            yield name, saved.cpu()  # all of them are kept until the checkpoint is written

    def load_error(self, name: str, saved: Tensor, shard: Tensor) -> None:
        """Set the error buffer of ``shard`` to this node's share of a sum that ``share_errors`` yielded."""
        shape = self.matrix_shape(name, shard)
        if shape is None:
            return
        total = saved.to(self.device or shard.device)
        total = MEAN.decode(total) if saved.dtype == torch.uint16 else total
        error = torch.zeros(shape, device=total.device)
        error.view(-1)[: shard.numel()].copy_(total.flatten()).div_(self.nodes)
        self._buffers.write(f"error.{name}", error, shard.dtype != torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's state: ``error.NAME`` and, with a warm start, ``factor.NAME``.

        For 16-bit gradients these are 1-6-9 codes (uint16). They are not copies: the next ``reduce`` changes them.
        """
        state = self._buffers.state_dict()
        return state if self.settings.warm_start else {k: v for k, v in state.items() if k.startswith("error.")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned, or a part of it."""
        for key in state:
            kind, _, name = key.partition(".")
            if kind not in ("error", "factor") or name not in self.columns:
                raise ValueError(f"{key!r} is no part of PowerSGD's state of these parameters")
        self._buffers.load_state_dict(state)

    def _reduce_matrices(self, matrices: list[_Matrix], packed: bool, update: int) -> bool:
        """Reduce ``matrices``, all of them ``packed`` or none; return False if anything is not finite."""
        totals = [self._gradient_plus_error(matrix) for matrix in matrices]
        products = [total @ self._factor(matrix, total.device) for matrix, total in zip(matrices, totals, strict=True)]
        left = [mean for _, mean in self._means(products, packed)]
        del products
        if not _all_finite(left):
            self._keep_finite(matrices, totals, update)
            return False
        left = [torch.linalg.qr(p).Q for p in left]
        own = [total.T @ p for total, p in zip(totals, left, strict=True)]
        right = [mean for _, mean in self._means(own, packed)]
        if not _all_finite(right):
            self._keep_finite(matrices, totals, update)
            return False
        for matrix, total, p, own_q, q in zip(matrices, totals, left, own, right, strict=True):
            mean = (p @ q.T).mul_(matrix.scale).view(-1)[: matrix.gradient.numel()]
            matrix.gradient.copy_(mean.view_as(matrix.gradient))
            del mean
            # A node's error is its own gradient minus its own product P (M^T P)^T, so it is orthogonal to P up to the
            # rounding of the node's Q. Subtracting the mean product instead would add the node's deviation from the
            # mean. These deviations cancel in the sum over the nodes but grow from update to update.
            total.addmm_(p, own_q.T, alpha=-1)
            self._store_error(matrix, total, update)
            if self.settings.warm_start:
                self._buffers.write(f"factor.{matrix.name}", q.clone(), matrix.packed)
        return True

    def _keep_finite(self, matrices: list[_Matrix], totals: list[Tensor], update: int) -> None:
        """Store the sums of gradients and errors of which nothing was sent, and clear those that are not finite."""
        for matrix, total in zip(matrices, totals, strict=True):
            if total.isfinite().all():
                self._store_error(matrix, total, update)
            else:
                self._buffers.clear([f"error.{matrix.name}"])

    def _gradient_plus_error(self, matrix: _Matrix) -> Tensor:
        """Return the gradient plus the error buffer as an (M, N) float32 matrix."""
        device = self.device or matrix.gradient.device
        total = self._buffers.read(f"error.{matrix.name}", matrix.shape, device)
        if total is None:
            total = torch.zeros(matrix.shape, device=device)
        gradient = matrix.gradient.to(device).flatten()
        total.view(-1)[: gradient.numel()].add_(gradient, alpha=1 / matrix.scale)
        return total

    def _factor(self, matrix: _Matrix, device: torch.device) -> Tensor:
        """Return Q (N, r): the last update's, or the initial Gaussian, which is the same on every node.

        Without a warm start it stays the initial one, which trained equally well in the paper (section 2.5). If P is
        sent in 16 bit, the columns of Q are normalised first: with a warm start P would otherwise grow as the square of
        the gradients, in a format that ends at 16 and 2^-68.
        """
        key, size = f"factor.{matrix.name}", self.factor_shape(matrix.shape)
        factor = self._buffers.read(key, size, device)
        if factor is None:
            drawn = torch.randn(size, generator=torch_generator(self.seed, "power-sgd", matrix.name))
            self._buffers.write(key, drawn.to(device), matrix.packed)
            # Read back: a resumed run has the rounded factor too.
            return self._factor(matrix, device)
        if matrix.packed:
            factor = factor / torch.linalg.vector_norm(factor, dim=0).clamp_(min=torch.finfo(torch.float32).tiny)
        return factor

    def _store_error(self, matrix: _Matrix, error: Tensor, update: int) -> None:
        """Store the error for the next update.

        16-bit errors are rounded stochastically: every update may add less than half the distance between neighbouring
        codes, and rounding to nearest would lose it each time.
        """
        if self.settings.error_feedback:
            what = ("power-sgd-error", matrix.name, update, self.node)
            noise = torch_generator(self.seed, *what, device=error.device) if matrix.packed else None
            self._buffers.write(f"error.{matrix.name}", error, matrix.packed, noise)

    def _means(self, tensors: list[Tensor], packed: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each of ``tensors`` with its mean over the nodes in 32 bit, sending many in one message.

        If ``packed``, they are sent in 16 bit, and each tensor is replaced by its rounded values.
        """
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            flat = flat.to(self.device or flat.device).float()
            parts = flat.split([tensor.numel() for tensor in bucket])
            if packed:
                codes = encode(flat, multiple_of=self.nodes)
                decode(codes, flat)
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))
                self.bytes_sent += codes.nbytes
                all_reduce_mean(codes, self.group)
                decode(codes, flat)
                del codes
            else:
                self.bytes_sent += flat.nbytes
                dist.all_reduce(flat, group=self.group)
                flat /= self.nodes
            for tensor, part in zip(bucket, parts, strict=True):
                yield tensor, part.view(tensor.shape)


def _all_finite(tensors: list[Tensor]) -> bool:
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
