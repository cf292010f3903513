"""Gradients averaged between machines through low-rank factors: PowerSGD (Vogels et al. 2019, arXiv 1905.13727).

For each matrix's gradient M, to which what was not sent before has been added (their algorithms 1 and 2):

    P = M Q            averaged over the machines, then orthonormalised
    Q = M^T P          averaged over the machines
    every machine updates by P Q^T, and keeps its own M - P (M^T P)^T for the next time

As in the paper (Ramesh et al. 2021, section 2.4) each process does so with its shard of the gradient, already averaged
within its machine, and with the processes that hold the same shard in the other machines. P is orthonormalised by
Householder reflections, as there. They give an orthonormal basis even of a P without full rank, zeros among it, so that
no small multiple of the identity need be added. Unlike there all is in 32 bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_cli.distributed.compression import Shape, factor_rank, is_compressed, shard_rank
from dalle_cli.randomness import torch_generator
from dalle_cli.recipes.schema import PowerSgd
from dalle_cli.training.parallel import buckets


class _Matrix(NamedTuple):
    """A gradient that goes through factors, as the (M, N) matrix ``total`` with what was not sent before."""

    name: str
    gradient: Tensor
    shape: Shape
    total: Tensor


class PowerSgdReducer:
    """Averages gradients over ``group``: matrices through factors, everything else whole.

    It knows nothing of what trains: the caller hands it gradients of this process's shards that are averaged over its
    machine, complete for the update, and under no gradient scale.

    Args:
        settings: the recipe's ``prior.powersgd``.
        group: the processes that hold the same shards, one in each machine.
        columns: N of each parameter that is a matrix to be compressed, by name; its shard is whole rows of N numbers,
            and a last one that is not full counts as filled with zeros. Others (embeddings, gains, biases) are not
            named.
        shards: processes that a matrix's gradient is split among, which share the rank.
        seed: of the factors that Q begins with.

    Attributes:
        bytes_sent: bytes that this process has handed to collectives of ``group`` so far. What a link carries of them
            is the collective's affair: a ring of k machines sends 2 (k - 1) / k times as many from each.
    """

    def __init__(
        self,
        settings: PowerSgd,
        group: dist.ProcessGroup,
        columns: Mapping[str, int],
        shards: int = 1,
        seed: int = 0,
    ) -> None:
        self.settings, self.group, self.columns, self.seed = settings, group, columns, seed
        self.rank = shard_rank(settings.rank, shards)
        self.machines = dist.get_world_size(group)
        self.bytes_sent = 0
        self._errors: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}

    def shape(self, name: str, gradient: Tensor) -> Shape | None:
        """The matrix that ``gradient``, the shard of the parameter ``name``, is compressed as; None if it is not."""
        if name not in self.columns or not gradient.numel():
            return None
        columns = self.columns[name]
        shape = (-(-gradient.numel() // columns), columns)
        return shape if is_compressed(shape, self.rank, self.settings.min_compression) else None

    @torch.no_grad()
    def reduce(self, named: Iterable[tuple[str, Tensor]], update: int) -> None:
        """Replace each gradient, of any shape and in 16 or 32 bit, by (an approximation of) its mean over the machines.

        Every process of the group must name the same ones in the same order. All machines get the same bytes, if
        their processors and libraries do. If one that goes through factors is not finite, all that do come out as NaN,
        and what had not been sent of them before is forgotten.

        Args:
            named: gradients by their parameters' names; a resblock that is left out of an update is left out here.
            update: how many updates went before.
        """
        if self.machines == 1:
            return
        whole: list[Tensor] = []
        matrices: list[_Matrix] = []
        for name, gradient in named:
            shape = self.shape(name, gradient) if update >= self.settings.start_update else None
            if shape is None:
                whole.append(gradient)
            else:
                matrices.append(_Matrix(name, gradient, shape, self._add_up(name, gradient, shape)))
        for gradient, mean in self._means(whole):
            gradient.copy_(mean)
        if not self._reduce_matrices(matrices):
            for matrix in matrices:
                matrix.gradient.fill_(torch.nan)
            self.clear(matrix.name for matrix in matrices)

    def clear(self, names: Iterable[str] | None = None) -> None:
        """Forget what was not sent of the gradients of ``names``, or of all.

        For an update that was skipped although its gradients were reduced: what was sent of them is lost, and what was
        not would come alone. (An update that is skipped before ``reduce`` needs no clearing.)
        """
        for name in list(self._errors) if names is None else names:
            self._errors.pop(name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """What training goes on from, of this very process: ``error.NAME`` and, with a warm start, ``factor.NAME``.

        The tensors are not copies: the next ``reduce`` changes them.
        """
        state = {f"error.{name}": error for name, error in self._errors.items()}
        if self.settings.warm_start:
            state |= {f"factor.{name}": factor for name, factor in self._factors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what ``state_dict`` gave.

        Raises:
            ValueError: a key that is of no matrix.
        """
        self._errors, self._factors = {}, {}
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if kind not in ("error", "factor") or name not in self.columns:
                raise ValueError(f"{key!r} is no part of PowerSGD's state of these parameters")
            (self._errors if kind == "error" else self._factors)[name] = tensor.clone()

    def _add_up(self, name: str, gradient: Tensor, shape: Shape) -> Tensor:
        """What is to be sent, (M, N): the gradient and what was not sent before, in whose place it stands."""
        total = self._kept(self._errors, name, shape, gradient.device)
        if total is None:
            total = torch.zeros(shape, device=gradient.device)
        total.view(-1)[: gradient.numel()] += gradient.flatten()
        if self.settings.error_feedback:
            self._errors[name] = total
        return total

    def _factor(self, matrix: _Matrix) -> Tensor:
        """Q, (N, r): the last update's, or the Gaussian one of the start, the same on every machine.

        Without a warm start it stays that one, as in the paper (section 2.4), where it made no difference.
        """
        size, device = (matrix.shape[1], factor_rank(matrix.shape, self.rank)), matrix.total.device
        factor = self._kept(self._factors, matrix.name, size, device)
        if factor is None:
            factor = torch.randn(size, generator=torch_generator(self.seed, "power-sgd", matrix.name)).to(device)
        self._factors[matrix.name] = factor
        return factor

    @staticmethod
    def _kept(kept: Mapping[str, Tensor], name: str, shape: Shape, device: torch.device) -> Tensor | None:
        found = kept.get(name)
        if found is not None and found.shape != shape:
            raise ValueError(f"PowerSGD's state of {name} is {tuple(found.shape)}, its shard and rank make it {shape}")
        return None if found is None else found.to(device)

    def _reduce_matrices(self, matrices: list[_Matrix]) -> bool:
        """Steps P and Q of all, with few messages for each; False where something was not finite."""
        products = [matrix.total @ self._factor(matrix) for matrix in matrices]
        left = [mean for _, mean in self._means(products)]
        if not _all_finite(left):
            return False
        left = [torch.linalg.qr(p).Q for p in left]
        own = [matrix.total.T @ p for matrix, p in zip(matrices, left, strict=True)]
        right = [mean for _, mean in self._means(own)]
        if not _all_finite(right):
            return False
        for matrix, p, own_q, q in zip(matrices, left, own, right, strict=True):
            matrix.gradient.copy_((p @ q.T).flatten()[: matrix.gradient.numel()].view_as(matrix.gradient))
            # Less its own product, what is left to a machine lies beside P. Less the mean one it would hold how far its
            # gradients are from the mean too, which cancels among the machines but grows from update to update.
            matrix.total.addmm_(p, own_q.T, alpha=-1)
            if self.settings.warm_start:
                self._factors[matrix.name] = q.clone()
        return True

    def _means(self, tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of ``tensors`` with its mean over the machines, in 32 bit; many travel in one message."""
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket]).float()
            self.bytes_sent += flat.nbytes
            dist.all_reduce(flat, group=self.group)
            flat /= self.machines
            for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                yield tensor, mean.view(tensor.shape)


def _all_finite(tensors: list[Tensor]) -> bool:
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
