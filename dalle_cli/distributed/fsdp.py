"""ZeRO: the model's parameters, gradients and moments in parts, one for each process of a node (paper, section 2.4).

By torch's ``fully_shard``, which has each parameter's rows on one process each and brings a resblock's together just
before it is used. The stages of ZeRO differ in what is kept together in between:

* 1: weights from their first use in an update to its end, and gradients until the update's last backward pass;
* 2: weights likewise, but each backward pass's gradients are parted at once;
* 3: a resblock's weights are parted after its forward pass too, and brought together again for its backward pass.

Matrices of the resblocks, embeddings and heads are parted. Gains and biases, a thousandth of the parameters and of
another type than the matrices in 16 bit, are whole on every process. Between nodes gradients are added up, or go
through ``distributed/power_sgd.py``; then every process updates its part. Nothing here holds a parameter in 32 bit
besides: with moments in 16 bit too, a process of eight that train 12e9 parameters holds 1.5e9 of 8 bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dalle_cli.config.schema import PowerSgd, Sharding
from dalle_cli.distributed.group import Group, Nodes, Traffic
from dalle_cli.distributed.power_sgd import PowerSgdReducer
from dalle_cli.precision.gradient_scaling import GradientScaling, ScaledBlock
from dalle_cli.progress import log


class BlockModel(Protocol):
    """A module that is a stack of resblocks, as this engine needs it."""

    resblocks: nn.ModuleList

    @property
    def heads(self) -> list[nn.Module]:
        """Modules beside the resblocks that are gathered on their own, just before their use."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """See ``nn.Module.parameters``."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See ``nn.Module.named_parameters``."""

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole initial value of each parameter with its name, one at a time."""

    def decayed_parameters(self) -> dict[str, nn.Parameter]:
        """Return the matrices of the resblocks by name: weight decay and PowerSGD apply to them alone."""


@dataclass
class BlockPart:
    """A resblock as gradient scaling sees it: its scale, and this process's parts of its parameters."""

    block: ScaledBlock
    parts: list[nn.Parameter]

    @property
    def gradient_scale(self) -> float | None:
        return self.block.gradient_scale

    @gradient_scale.setter
    def gradient_scale(self, scale: float | None) -> None:
        self.block.gradient_scale = scale

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.parts)


class Sharded:
    """ZeRO stages 1, 2 and 3, as an ``Engine``.

    Args:
        model: a model on the meta device, its resblocks cast to the type they train in.
        loss: a module that holds ``model`` and whose forward pass is the loss: ``fully_shard`` gathers parameters
            around forward passes.
        seed: of the initial weights, which each process draws one parameter after another, keeping its own rows.
        group: all processes.
        nodes: the same, in nodes.
        sharding: of the recipe; ``zero`` is 1, 2 or 3.
        powersgd: of the recipe.
    """

    whole = False

    def __init__(
        self,
        model: BlockModel,
        loss: nn.Module,
        seed: int,
        group: Group,
        nodes: Nodes,
        sharding: Sharding,
        powersgd: PowerSgd,
    ) -> None:
        # fully_shard calls functions of its own package that the package deprecates.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        self.group, self.nodes, self.zero = group, nodes, sharding.zero
        self.loss = loss
        self._shard(model, sharding)
        offload = sharding.offload == "cpu" and group.device.type != "cpu"
        self.loss.to_empty(device="cpu" if offload else group.device)
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._rows: dict[str, slice] = {}
        self._sharded: dict[str, DTensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            self._take_part(name, parameter)
        self._to_own_device(model)
        with torch.no_grad():
            for name, value in model.initial_values(seed):
                if name in self.parameters:
                    self.parameters[name].copy_(value[self._rows[name]])
        self._modules = [module for module in self.loss.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            count_traffic(module, nodes.inside.traffic)
        self.blocks = [self._block_part(model, i) for i in range(len(model.resblocks))]
        self._prefetch(model)
        self.reducer: PowerSgdReducer | None = None
        if powersgd.rank and nodes.across.size > 1:
            columns = {name: p.shape[1] for name, p in model.decayed_parameters().items()}
            self.reducer = PowerSgdReducer(
                powersgd, nodes.across.processes, columns, nodes.inside.size, seed, group.device
            )

    def micro_batch(self, last: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(last or self.zero > 1, recurse=False)
            module.set_reshard_after_backward(last or self.zero == 3, recurse=False)

    def collect_gradients(self, update: int, scaling: GradientScaling | None) -> None:
        for name, parameter in self._sharded.items():
            self.parameters[name].grad, parameter.grad = cast(DTensor, parameter.grad).to_local(), None
        replicated = [p for name, p in self.parameters.items() if name not in self._sharded]
        self.group.sum_gradients(replicated)
        if self.nodes.across.size == 1:
            return
        if self.reducer is None:
            self.nodes.across.sum_gradients([self.parameters[name] for name in self._sharded])
        else:
            self._reduce(self.reducer, scaling, update)

    def counted(self) -> list[nn.Parameter]:
        return [self.parameters[name] for name in self._counted()]

    def sum_over_parts(self, value: Tensor) -> Tensor:
        return self.nodes.inside.sum(value).to(value.device)

    def settle(self) -> None:
        for module in self._modules:
            module.reshard()

    def rows(self, name: str) -> slice:
        return self._rows[name]

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def writes(self) -> list[str]:
        self._require_same_nodes()
        return self._counted() if self.nodes.across.leads else []

    def own_state(self) -> dict[str, Tensor]:
        return {} if self.reducer is None else self.reducer.state_dict()

    def load_own_state(self, state: Mapping[str, Tensor] | None) -> None:
        if self.reducer is None:
            return
        if state is None or not self._fits(state):
            log("prior.powersgd: other processes than the checkpoint's; what was not sent before is forgotten")
            state = {}
        self.reducer.load_state_dict(state)

    def counters(self) -> dict[str, Callable[[], int]]:
        """What only grows, by the name that the journal has it under."""
        across = {"bytes_between_nodes": self._sent_across} if self.nodes.across.size > 1 else {}
        return {"bytes_communicated": self._sent, **across}

    def _sent(self) -> int:
        return self.group.traffic.bytes + self.nodes.inside.traffic.bytes + self._sent_across()

    def _require_same_nodes(self) -> None:
        """Refuse to save nodes that have come apart: what a checkpoint held would be the first one's alone."""
        if self.nodes.across.size == 1:
            return
        digest = hashlib.sha256()
        for parameter in self.parameters.values():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        self.nodes.across.require_same("weights", digest.hexdigest())

    def _sent_across(self) -> int:
        return self.nodes.across.traffic.bytes + (0 if self.reducer is None else self.reducer.bytes_sent)

    def _fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether PowerSGD's ``state`` is of shards such as this process has."""
        reducer = cast(PowerSgdReducer, self.reducer)
        for key, value in state.items():
            kind, _, name = key.partition(".")
            shape = reducer.shape(name, self.parameters[name]) if name in self.parameters else None
            if shape is None or (kind == "error" and value.shape != shape):
                return False
        return True

    def _shard(self, model: BlockModel, sharding: Sharding) -> None:
        inside = self.nodes.inside
        mesh = DeviceMesh.from_group(inside.processes, inside.device.type)
        policy = OffloadPolicy()
        if sharding.offload == "cpu" and inside.device.type != "cpu":
            policy = CPUOffloadPolicy()
        small = {p for block in model.resblocks for p in block.parameters() if p.dim() == 1}
        for module in [*model.resblocks, *model.heads, self.loss]:
            together = self.zero < 3 or module is self.loss
            fully_shard(
                module, mesh=mesh, reshard_after_forward=not together, offload_policy=policy, ignored_params=small
            )

    def _take_part(self, name: str, parameter: nn.Parameter) -> None:
        """Keep this process's rows of a parameter as one by itself that shares their memory."""
        if not isinstance(parameter, DTensor):
            self._rows[name] = slice(0, parameter.shape[0])
            self.parameters[name] = parameter
            return
        part = cast(DTensor, parameter.detach()).to_local()
        if part.numel():
            (count, *_), (first, *_) = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            self._rows[name] = slice(first, first + count)
            self.parameters[name] = nn.Parameter(part)
            self._sharded[name] = parameter

    def _to_own_device(self, model: BlockModel) -> None:
        """What is not sharded is where it is used, also where the rest is offloaded."""
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(self.group.device)

    def _block_part(self, model: BlockModel, i: int) -> BlockPart:
        prefix = f"resblocks.{i}."
        parts = [p for name, p in self.parameters.items() if name.startswith(prefix)]
        return BlockPart(cast(ScaledBlock, model.resblocks[i]), parts)

    @staticmethod
    def _prefetch(model: BlockModel) -> None:
        """Have the next resblock's weights on their way while one is at work, forward as backward."""
        blocks = [cast(FSDPModule, block) for block in model.resblocks]
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])

    def _counted(self) -> list[str]:
        first = self.nodes.inside.leads
        return [name for name in self.parameters if first or name in self._sharded]

    def _reduce(self, reducer: PowerSgdReducer, scaling: GradientScaling | None, update: int) -> None:
        """The sharded gradients' sums over the nodes, through PowerSGD.

        What is not to be used (see ``GradientScaling``) must not reach what PowerSGD keeps for the next update: before
        anything is sent all processes agree on where one of them has a gradient that is not finite, and leave it out.
        """
        index = {name: 0 if scaling is None else scaling.scale_index(p) for name, p in self.parameters.items()}
        scales = [1.0] if scaling is None else scaling.values()
        broken = self._broken([index[name] for name in self.parameters], len(scales))
        left_out, used, scale_of = [], [], {}
        for name in self._sharded:
            gradient = cast(Tensor, self.parameters[name].grad)
            if broken[index[name]]:
                gradient.fill_(torch.nan)
                left_out.append(name)
            else:
                used.append((name, gradient))
                scale_of[name] = scales[index[name]]
        reducer.clear(left_out)
        reducer.reduce(used, update, scale_of)
        for _, gradient in used:
            gradient.mul_(self.nodes.across.size)

    def _broken(self, indices: list[int], count: int) -> list[bool]:
        """Under which of ``count`` scales a gradient is not finite on one of the processes.

        The last is that of parameters under none, which keep everything from being updated.
        """
        flags = [(~cast(Tensor, p.grad).isfinite().all()).to(self.group.device) for p in self.parameters.values()]
        found = torch.zeros(count, device=self.group.device)
        found.index_add_(0, torch.tensor(indices, device=found.device), torch.stack(flags).float())
        broken = [value > 0 for value in self.group.sum(found).tolist()]
        return [each or broken[-1] for each in broken]


def count_traffic(module: FSDPModule, traffic: Traffic) -> None:
    """Have ``traffic`` grow by the bytes of this process's shards that are gathered and of the gradients that are
    scattered.
    """
    module.set_custom_all_gather(_AllGather(traffic))  # type: ignore[arg-type]
    module.set_custom_reduce_scatter(_ReduceScatter(traffic))  # type: ignore[arg-type]


class _Counted:
    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        self.traffic.bytes += input_tensor.nbytes
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        self.traffic.bytes += input_tensor.nbytes
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
