"""Gradients averaged between machines through low-rank factors: PowerSGD (Vogels et al. 2019, arXiv 1905.13727).

For each matrix's gradient M, to which what was not sent before has been added (their algorithms 1 and 2):

    P = M Q            averaged over the machines, then orthonormalised
    Q = M^T P          averaged over the machines
    every machine updates by P Q^T, and keeps its own M - P (M^T P)^T for the next time

As in the paper (Ramesh et al. 2021, section 2.4) each process does so with its shard of the gradient, already averaged
within its machine, and with the processes that hold the same shard in the other machines. P is orthonormalised by
Householder reflections, as there. They give an orthonormal basis even of a P without full rank, zeros among it, so that
no small multiple of the identity need be added. Of 16-bit gradients, what is kept and what is sent as factors is in 16
bit, as there (appendix E.2); everything is computed in 32 bit. Few matrices at a time are, so that an update needs room
for those few and not for the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_cli.config.schema import PowerSgd
from dalle_cli.distributed.average_16bit import average_codes, to_codes, to_values
from dalle_cli.distributed.compression import Shape, factor_rank, is_compressed, shapes_together, shard_rank
from dalle_cli.distributed.error_buffers import Kept
from dalle_cli.distributed.group import buckets
from dalle_cli.randomness import torch_generator


class _Matrix(NamedTuple):
    """A gradient that goes through factors as an (M, N) matrix, once it is divided by its scale."""

    name: str
    gradient: Tensor
    shape: Shape
    scale: float

    @property
    def packed(self) -> bool:
        """Whether what is kept and sent of it takes 16 bit."""
        return self.gradient.dtype != torch.float32


class PowerSgdReducer:
    """Averages gradients over ``group``: matrices through factors, everything else whole.

    It knows nothing of what trains: the caller hands it gradients of this process's shards that are averaged over its
    machine and complete for the update.

    Args:
        settings: the recipe's ``prior.powersgd``.
        group: the processes that hold the same shards, one in each machine.
        columns: N of each parameter that is a matrix to be compressed, by name; its shard is whole rows of N numbers,
            and a last one that is not full counts as filled with zeros. Others (embeddings, gains, biases) are not
            named.
        shards: processes that a matrix's gradient is split among, which share the rank.
        seed: of the factors that Q begins with, and of the rounding of errors in 16 bit.
        device: where ``group`` communicates, and the work is done; by default where a gradient is.

    Attributes:
        bytes_sent: bytes that this process has handed to ``group`` for means so far. What a link carries of them is the
            collective's affair: of k machines each sends 2 (k - 1) / k times as many, in a ring of all-reduce as by
            ``mean_16``, whose bytes are those of the codes, with what fills the last part of a message.
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
        self.machines, self.machine = dist.get_world_size(group), dist.get_rank(group)
        self.bytes_sent = 0
        self._kept = Kept(on_host=settings.offload == "cpu")

    def shape(self, name: str, gradient: Tensor) -> Shape | None:
        """The matrix that ``gradient``, the shard of the parameter ``name``, is compressed as; None if it is not."""
        if name not in self.columns or not gradient.numel():
            return None
        columns = self.columns[name]
        shape = (-(-gradient.numel() // columns), columns)
        return shape if is_compressed(shape, self.rank, self.settings.min_compression) else None

    @torch.no_grad()
    def reduce(
        self, named: Iterable[tuple[str, Tensor]], update: int, scales: Mapping[str, float] | None = None
    ) -> None:
        """Replace each gradient, of any shape and in 16 or 32 bit, by (an approximation of) its mean over the machines.

        Every process of the group must name the same ones in the same order. All machines get the same bytes, if
        their processors and libraries do. If one that goes through factors is not finite, it and those that travel with
        it come out as NaN, and what had not been sent of them before is forgotten.

        Args:
            named: gradients by their parameters' names; a resblock that is left out of an update is left out here.
            update: how many updates went before.
            scales: what gradients are multiplied by, 1 by default. What was not sent is kept without it.
        """
        if self.machines == 1:
            return
        scales = scales or {}
        whole: list[Tensor] = []
        matrices: list[_Matrix] = []
        for name, gradient in named:
            shape = self.shape(name, gradient) if update >= self.settings.start_update else None
            if shape is None:
                whole.append(gradient)
            else:
                matrices.append(_Matrix(name, gradient, shape, scales.get(name, 1.0)))
        for gradient, mean in self._means(whole):
            gradient.copy_(mean)
        for packed in (False, True):
            alike = [matrix for matrix in matrices if matrix.packed == packed]
            for places in shapes_together([matrix.shape for matrix in alike]):
                together = alike[places]
                if not self._reduce_matrices(together, packed, update):
                    for matrix in together:
                        matrix.gradient.fill_(torch.nan)
                    self.clear(matrix.name for matrix in together)

    def clear(self, names: Iterable[str] | None = None) -> None:
        """Forget what was not sent of the gradients of ``names``, or of all.

        For an update that was skipped although its gradients were reduced: what was sent of them is lost, and what was
        not would come alone. (An update that is skipped before ``reduce`` needs no clearing.)
        """
        self._kept.forget([f"error.{name}" for name in (self.columns if names is None else names)])

    def state_dict(self) -> dict[str, Tensor]:
        """What training goes on from, of this very process: ``error.NAME`` and, with a warm start, ``factor.NAME``.

        Of 16-bit gradients they are codes of the format 1-6-9 (uint16). The tensors are not copies: the next ``reduce``
        changes them.
        """
        state = self._kept.tensors()
        return state if self.settings.warm_start else {k: v for k, v in state.items() if k.startswith("error.")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what ``state_dict`` gave.

        Raises:
            ValueError: a key that is of no matrix.
        """
        for key in state:
            kind, _, name = key.partition(".")
            if kind not in ("error", "factor") or name not in self.columns:
                raise ValueError(f"{key!r} is no part of PowerSGD's state of these parameters")
        self._kept.load(state)

    def _total(self, matrix: _Matrix) -> Tensor:
        """What is to be sent, (M, N) in 32 bit: the gradient and what was not sent before."""
        device = self.device or matrix.gradient.device
        total = self._kept.read(f"error.{matrix.name}", matrix.shape, device)
        if total is None:
            total = torch.zeros(matrix.shape, device=device)
        gradient = matrix.gradient.to(device).flatten()
        total.view(-1)[: gradient.numel()].add_(gradient, alpha=1 / matrix.scale)
        return total

    def _factor(self, matrix: _Matrix, device: torch.device) -> Tensor:
        """Q, (N, r): the last update's, or the Gaussian one of the start, the same on every machine.

        Without a warm start it stays that one, as in the paper (section 2.4), where it made no difference. P may have
        columns of any length. For one that is sent in 16 bit, those of Q are made 1 long: with a warm start P would
        have the squares of what gradients have, in a format that ends at 16 and 2^-68.
        """
        key, size = f"factor.{matrix.name}", (matrix.shape[1], factor_rank(matrix.shape, self.rank))
        factor = self._kept.read(key, size, device)
        if factor is None:
            drawn = torch.randn(size, generator=torch_generator(self.seed, "power-sgd", matrix.name))
            self._kept.write(key, drawn.to(device), matrix.packed)
            # As a run that goes on reads it.
            return self._factor(matrix, device)
        if matrix.packed:
            factor = factor / torch.linalg.vector_norm(factor, dim=0).clamp_(min=torch.finfo(torch.float32).tiny)
        return factor

    def _keep(self, matrix: _Matrix, left: Tensor, factor: Tensor, update: int) -> None:
        """For the next update: what was ``left`` unsent, and Q.

        Errors in 16 bit are rounded stochastically: what an update adds may be less than half the distance between
        neighbouring codes, update after update, and the nearest code would lose it all.
        """
        if self.settings.error_feedback:
            what = ("power-sgd-error", matrix.name, update, self.machine)
            noise = torch_generator(self.seed, *what, device=left.device) if matrix.packed else None
            self._kept.write(f"error.{matrix.name}", left, matrix.packed, noise)
        if self.settings.warm_start:
            self._kept.write(f"factor.{matrix.name}", factor, matrix.packed)

    def _reduce_matrices(self, matrices: list[_Matrix], packed: bool, update: int) -> bool:
        """Steps P and Q of all, which are ``packed`` or not, with few messages for each; False where something was not
        finite.
        """
        totals = [self._total(matrix) for matrix in matrices]
        products = [total @ self._factor(matrix, total.device) for matrix, total in zip(matrices, totals, strict=True)]
        left = [mean for _, mean in self._means(products, packed)]
        del products
        if not _all_finite(left):
            return False
        left = [torch.linalg.qr(p).Q for p in left]
        own = [total.T @ p for total, p in zip(totals, left, strict=True)]
        right = [mean for _, mean in self._means(own, packed)]
        if not _all_finite(right):
            return False
        for matrix, total, p, own_q, q in zip(matrices, totals, left, own, right, strict=True):
            mean = (p @ q.T).mul_(matrix.scale).view(-1)[: matrix.gradient.numel()]
            matrix.gradient.copy_(mean.view_as(matrix.gradient))
            del mean
            # Less its own product, what is left to a machine lies beside P, but for what rounding took from the own Q
            # that it sent. Less the mean one it would hold how far its gradients are from the mean too, which cancels
            # among the machines but grows from update to update.
            total.addmm_(p, own_q.T, alpha=-1)
            self._keep(matrix, total, q.clone(), update)
        return True

    def _means(self, tensors: list[Tensor], packed: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of ``tensors`` with its mean over the machines, in 32 bit; many travel in one message.

        Those that are ``packed`` travel in 16 bit, and become what was sent of them.
        """
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            flat = flat.to(self.device or flat.device).float()
            parts = flat.split([tensor.numel() for tensor in bucket])
            if packed:
                codes = to_codes(flat, self.machines)
                to_values(codes, flat)
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))
                self.bytes_sent += codes.nbytes
                average_codes(codes, self.group)
                to_values(codes, flat)
                del codes
            else:
                self.bytes_sent += flat.nbytes
                dist.all_reduce(flat, group=self.group)
                flat /= self.machines
            for tensor, part in zip(bucket, parts, strict=True):
                yield tensor, part.view(tensor.shape)


def _all_finite(tensors: list[Tensor]) -> bool:
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
