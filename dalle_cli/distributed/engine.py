"""The engine: how a model's parameters are spread over ranks during training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dalle_cli.distributed.group import ALONE, Group
from dalle_cli.precision.gradient_scaling import GradientScaling
from dalle_cli.stores.tensor_files import WHOLE, Part, Slab


class Optimizer(Protocol):
    """Makes updates from collected gradients, and holds the moments of the parts of parameters on this rank."""

    def zero_grad(self) -> None:
        """Drop all gradients and their memory."""

    def step(self, rate: float) -> dict[str, Tensor]:
        """Clip the gradients and make one update with learning rate ``rate``; return values to log."""

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return the moments of this rank's part of the parameter ``name`` and their ``step``, if there are any."""

    def load_moments(self, moments: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Restore what ``moments`` returned, by parameter, in whatever precision it was saved."""

    def trainer_state(self) -> dict[str, Any]:
        """Return the state besides the moments, as JSON values."""

    def load_trainer_state(self, state: Mapping[str, Any]) -> None:
        """Restore what ``trainer_state`` returned, by this or another optimizer."""


class Engine(Protocol):
    """Holds a model's parameters on all ranks. All ranks call the same methods in the same order."""

    group: Group
    model: nn.Module
    sharded: bool
    """True if a rank holds only parts of the parameters, so that no rank can validate or save alone."""
    own_optimizer: Optimizer | None
    """The optimizer if the engine brings its own; None if training builds one for it."""

    @property
    def names(self) -> list[str]:
        """The trainable parameters of which this rank holds a part, which may be the whole."""

    def read(self, name: str) -> Tensor:
        """Return this rank's part of the parameter ``name``. Read it before the next update or ``write``."""

    def write(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Replace this rank's parts of parameters on all ranks together, and drop gathered copies of the old ones."""

    def begin_micro_batch(self, last: bool) -> None:
        """Prepare for a micro-batch's forward pass; ``last`` marks the last micro-batch of the update."""

    def forward(self, loss: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
        """Return ``loss(*arguments)``, the forward pass of a micro-batch, whose "loss" goes to ``backward``."""

    def backward(self, loss: Tensor) -> None:
        """Run a micro-batch's backward pass. The losses of all micro-batches and ranks add up to the update's."""

    def collect_gradients(self, update: int) -> None:
        """Sum each parameter's gradient over all ranks, after the last backward pass of ``update`` (from 0).

        Scaled gradients in 16 bit are averaged, since their sum could overflow; see ``GradientScaling``.
        """

    def release_gathered(self) -> None:
        """Drop gathered copies of the parameters, after an update or a forward pass."""

    def slab(self, name: str) -> Slab:
        """Return the slab of the parameter ``name`` that this rank's part lies in."""

    def cut(self, name: str, slab: Tensor) -> Tensor:
        """Cut this rank's part out of the ``slab`` of the parameter ``name``, or of one of its moments."""

    def part_to_save(self, name: str, value: Tensor) -> Part | None:
        """Return what this rank saves of the parameter ``name``, or of its EMA or a moment, whose part is ``value``.

        Over all ranks, each value is saved once. None: other ranks save it.
        """

    def require_same_weights(self) -> None:
        """Raise UserError if ranks that should hold the same weights do not."""

    def share_errors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the errors of compressed gradients to save, by parameter; the engine's own errors may change."""

    def load_errors(self, saved: Iterable[tuple[str, Tensor]]) -> None:
        """Restore what ``share_errors`` yielded, on any number of ranks."""

    def rank_state(self) -> dict[str, Tensor]:
        """Return the state besides the parameters that this rank alone needs to resume."""

    def load_rank_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Restore what ``rank_state`` returned; None if the checkpoint is from another number of ranks."""

    def traffic(self) -> dict[str, int]:
        """Return the bytes that this rank has sent so far, by the name that the journal gives them."""


class TorchEngine:
    """Base of engines by torch alone: a rank's parts are slabs, held as parameters with their gradients in ``grad``."""

    own_optimizer: Optimizer | None = None
    group: Group
    sharded: bool
    parameters: dict[str, nn.Parameter]
    """This rank's part of each trainable parameter, by the parameter's name."""
    scaling: GradientScaling | None
    """Scaling of the gradients in 16-bit training, None in 32 bit."""
    loss_scaler: torch.amp.GradScaler | None = None
    """Scaling of the loss by one factor, for 32-bit weights under float16 autocast."""

    @property
    def names(self) -> list[str]:
        return list(self.parameters)

    def read(self, name: str) -> Tensor:
        return self.parameters[name].detach()

    @torch.no_grad()
    def write(self, values: Iterable[tuple[str, Tensor]]) -> None:
        self.release_gathered()
        for name, value in values:
            self.parameters[name].copy_(value)

    def forward(self, loss: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
        return loss(*arguments)

    def backward(self, loss: Tensor) -> None:
        scaled = loss if self.loss_scaler is None else self.loss_scaler.scale(loss)
        scaled.backward()

    def release_gathered(self) -> None:
        """Do nothing: nothing is gathered."""

    def cut(self, name: str, slab: Tensor) -> Tensor:
        return slab

    def share_errors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: nothing is compressed."""
        return iter(())

    def load_errors(self, saved: Iterable[tuple[str, Tensor]]) -> None:
        """Do nothing: nothing is compressed."""

    def owned_parameters(self) -> list[nn.Parameter]:
        """Return the parameters this rank contributes to global norms; ``sum_over_shards`` counts each value once."""
        return list(self.parameters.values())

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over the ranks that hold the model together."""
        return value


class Replicated(TorchEngine):
    """An engine where every rank holds the whole model (ZeRO stage 0).

    Several ranks sum their gradients through torch's DistributedDataParallel, a bucket at a time, while the backward
    pass goes on.
    """

    sharded = False

    def __init__(
        self,
        model: nn.Module,
        group: Group = ALONE,
        scaling: GradientScaling | None = None,
        loss_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.group, self.scaling, self.loss_scaler = model, group, scaling, loss_scaler
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def begin_micro_batch(self, last: bool) -> None:
        if self.group.size > 1:
            # This is what its no_sync() does, which would have to be a block around both passes.
            self._parallel.require_backward_grad_sync = last

    def forward(self, loss: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
        if self.group.size == 1:
            return loss(*arguments)
        return self._parallel(loss, *arguments)  # type: ignore[no-any-return]

    def collect_gradients(self, update: int) -> None:
        """Do nothing: the last backward pass has summed the gradients."""

    @cached_property
    def _parallel(self) -> DistributedDataParallel:
        # A convolution of 1 x 1 has several equal layouts, of which its weight has one and its gradient another.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides", category=UserWarning)
        parallel = DistributedDataParallel(
            _Calls(self.model),
            process_group=self.group.process_group,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
        # It would compare annotations, which are text in this file.
        parallel.register_comm_hook(None, lambda state, bucket: self._sum_bucket(bucket))
        # After its first backward pass it forms the buckets anew, in the order in which gradients came. A pass of zeros
        # settles it, from the last parameter to the first, so that a resumed run rounds its sums as any other does.
        counted = self.group.traffic.bytes
        parallel(lambda: {"loss": sum(map(_Zero.apply, self.parameters.values()))})["loss"].backward()
        for parameter in self.parameters.values():
            parameter.grad = None
        self.group.traffic.bytes = counted
        return parallel

    def _sum_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Begin to sum a bucket over the ranks, or to average the scaled gradients in it."""
        scaled = [
            gradient
            for gradient, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True)
            if self.scaling is not None and self.scaling.scales_gradient_of(parameter)
        ]
        before, after = self.group.mean_factors()
        for gradient in scaled:
            gradient.mul_(before)
        total = bucket.buffer()
        self.group.traffic.bytes += total.nbytes
        work = dist.all_reduce(total, group=self.group.process_group, async_op=True)

        def finish(done: torch.futures.Future[Any]) -> Tensor:
            done.value()  # which raises what went wrong
            for gradient in scaled:
                gradient.mul_(after)
            return total

        return work.get_future().then(finish)

    def slab(self, name: str) -> Slab:
        return WHOLE

    def part_to_save(self, name: str, value: Tensor) -> Part | None:
        return Part(value, 0, tuple(value.shape)) if self.group.leads else None

    def require_same_weights(self) -> None:
        """Do nothing: the weights start equal and get the same updates."""

    def rank_state(self) -> dict[str, Tensor]:
        return {}

    def load_rank_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Do nothing: there is no such state."""

    def traffic(self) -> dict[str, int]:
        return {"bytes_communicated": self.group.traffic.bytes}


class _Calls(nn.Module):
    """A model whose forward pass is a function of it, since DistributedDataParallel works around forward passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
        """Return ``work(*arguments)``, which computes with the model."""
        return work(*arguments)


class _Zero(torch.autograd.Function):
    """Zero, whose gradient in a parameter is zeros in the same layout. Of a sum of them, the last comes first."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return parameter.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        (parameter,) = ctx.saved_tensors
        return torch.zeros_like(parameter)
