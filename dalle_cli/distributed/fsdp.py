"""Sharded training (ZeRO): each rank of a node holds one shard of every parameter, gradient and moment.

This is the paper's parameter sharding (section 2.5), by torch's ``fully_shard``, which stores each row of a parameter,
or each column of a matrix wider than high, on one rank and gathers a resblock just before its use. The ZeRO stages
differ in how long things stay gathered:

* 1: weights from their first use in an update to its end, and gradients until the update's last backward pass;
* 2: weights as in stage 1, but each backward pass's gradients are reduce-scattered at once;
* 3: a resblock's weights are released after its forward pass too, and gathered again for its backward pass.

The resblocks' matrices, the embeddings and the heads are sharded. The resblocks' gains and biases are replicated: they
are a thousandth of the parameters, and in 16-bit training their type differs from the matrices'. Between nodes,
gradients are summed, or go through PowerSGD (``distributed/between_nodes.py``). Then every rank updates its shards.
There is no 32-bit copy of the parameters: weight, gradient and moments take 8 bytes in 16-bit training, so each of
eight ranks that train 12e9 parameters holds 12 GB.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dalle_cli.config.schema import PowerSgd, Sharding
from dalle_cli.distributed.between_nodes import BetweenNodes
from dalle_cli.distributed.compression import shard_axis
from dalle_cli.distributed.engine import TorchEngine
from dalle_cli.distributed.group import Nodes, Traffic
from dalle_cli.precision.gradient_scaling import GradientScaling, ScaledBlock
from dalle_cli.stores.tensor_files import WHOLE, Part, Slab


class BlockModel(Protocol):
    """A model that this engine can shard: a stack of resblocks with heads beside it."""

    resblocks: nn.ModuleList

    @property
    def heads(self) -> list[nn.Module]:
        """The modules beside the resblocks that are gathered separately, just before their use."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """See ``nn.Module.parameters``."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See ``nn.Module.named_parameters``."""

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole initial value of each parameter with its name, one at a time."""

    def decayed_parameters(self) -> dict[str, nn.Parameter]:
        """Return the resblocks' matrices by name, the only parameters with weight decay and PowerSGD."""


@dataclass
class ShardedBlock:
    """A resblock as gradient scaling sees it: its scale, and this rank's shards of its parameters."""

    block: ScaledBlock
    shards: list[nn.Parameter]

    @property
    def gradient_scale(self) -> Tensor | float | None:
        return self.block.gradient_scale

    @gradient_scale.setter
    def gradient_scale(self, scale: Tensor | float | None) -> None:
        self.block.gradient_scale = scale

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.shards)


class Sharded(TorchEngine):
    """An engine for ZeRO stages 1, 2 and 3.

    Args:
        model: a model on the meta device, its resblocks cast to the type they train in.
        loss: a module that holds ``model`` and computes the loss in its forward pass, since ``fully_shard`` gathers
            parameters around forward passes.
        seed: the seed of the initial weights. Each rank draws one parameter after another and keeps its own part.
    """

    sharded = True

    def __init__(
        self, model: BlockModel, loss: nn.Module, seed: int, nodes: Nodes, sharding: Sharding, powersgd: PowerSgd
    ) -> None:
        # fully_shard calls deprecated functions of its own package.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        self.group, self.nodes, self.zero = nodes.world, nodes, sharding.zero
        self.model, self.loss = cast(nn.Module, model), loss
        self.scaling: GradientScaling | None = None
        offload = sharding.offload == "cpu" and self.group.device.type != "cpu"
        self._shard(model, offload)
        self.loss.to_empty(device="cpu" if offload else self.group.device)
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._slabs: dict[str, Slab] = {}
        self._sharded: dict[str, DTensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            self._add_shard(name, parameter)
        self._move_replicated(model)
        with torch.no_grad():
            for name, value in model.initial_values(seed):
                if name in self.parameters:
                    self.parameters[name].copy_(self._slabs[name].of(value))
        self._modules = [module for module in self.loss.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            block = cast(nn.Module, module)
            scaled = block is not self.loss and any(p.dtype == torch.float16 for p in block.parameters())
            module.set_gradient_divide_factor(nodes.inside.size if scaled else 1.0)
            module.set_force_sum_reduction_for_comms(True)
            count_traffic(module, nodes.inside.traffic)
        self.blocks = [self._block(model, i) for i in range(len(model.resblocks))]
        self._prefetch(model)
        columns = {name: self.parameters.get(name, p).shape[1] for name, p in model.decayed_parameters().items()}
        self.between_nodes = BetweenNodes(nodes, powersgd, columns, seed)

    def begin_micro_batch(self, last: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(last or self.zero > 1, recurse=False)
            module.set_reshard_after_backward(last or self.zero == 3, recurse=False)

    def collect_gradients(self, update: int) -> None:
        for name, parameter in self._sharded.items():
            self.parameters[name].grad, parameter.grad = cast(DTensor, parameter.grad).to_local(), None
        replicated = [p for name, p in self.parameters.items() if name not in self._sharded]
        self._reduce_whole(replicated)
        self._sum_between_nodes(update)

    def owned_parameters(self) -> list[nn.Parameter]:
        first = self.nodes.inside.leads
        return [p for name, p in self.parameters.items() if first or name in self._sharded]

    def sum_over_shards(self, value: Tensor) -> Tensor:
        return self.nodes.inside.sum(value).to(value.device)

    def _reduce_whole(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum over all ranks, or average, the gradients of parameters that every rank holds whole."""
        scaled: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is not None:
                is_scaled = self.scaling is not None and self.scaling.scales_gradient_of(parameter)
                (scaled if is_scaled else others).append(parameter.grad)
        self.group.average_in_place(scaled)
        self.group.sum_in_place(others)

    def release_gathered(self) -> None:
        for module in self._modules:
            module.reshard()

    def slab(self, name: str) -> Slab:
        return self._slabs[name]

    def part_to_save(self, name: str, value: Tensor) -> Part | None:
        owned = name in self._sharded or self.nodes.inside.leads
        if not (owned and self.nodes.across.leads):
            return None
        first, _, axis = self._slabs[name]
        return Part(value, first, tuple(self._shapes[name]), axis)

    def require_same_weights(self) -> None:
        self.between_nodes.require_same_weights(map(self.read, self.names))

    def share_errors(self) -> Iterator[tuple[str, Tensor]]:
        return self.between_nodes.share_errors(self.parameters)

    def load_errors(self, saved: Iterable[tuple[str, Tensor]]) -> None:
        self.between_nodes.load_errors(saved, self.parameters)

    def rank_state(self) -> dict[str, Tensor]:
        return self.between_nodes.state()

    def load_rank_state(self, state: Mapping[str, Tensor] | None) -> None:
        self.between_nodes.load_state(state, self.parameters)

    def traffic(self) -> dict[str, int]:
        return self.between_nodes.traffic()

    def _shard(self, model: BlockModel, offload: bool) -> None:
        inside = self.nodes.inside
        mesh = DeviceMesh.from_group(inside.process_group, inside.device.type)
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        replicated = {p for block in model.resblocks for p in block.parameters() if p.dim() == 1}
        matrices = set(model.decayed_parameters().values())

        def placement(parameter: nn.Parameter) -> Shard:
            shape = parameter.shape
            return Shard(shard_axis((shape[0], shape[1]), inside.size) if parameter in matrices else 0)

        for module in [*model.resblocks, *model.heads, self.loss]:
            release = self.zero == 3 and module is not self.loss
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=release,
                shard_placement_fn=placement,
                offload_policy=policy,
                ignored_params=replicated,
            )

    def _add_shard(self, name: str, parameter: nn.Parameter) -> None:
        """Add this rank's part of a parameter to ``parameters``, as a parameter that shares its memory."""
        if not isinstance(parameter, DTensor):
            self._slabs[name] = WHOLE
            self.parameters[name] = parameter
            return
        shard = cast(DTensor, parameter.detach()).to_local()
        if shard.numel():
            axis = cast(Shard, parameter.placements[0]).dim
            counts, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            self._slabs[name] = Slab(offsets[axis], offsets[axis] + counts[axis], axis)
            self.parameters[name] = nn.Parameter(shard)
            self._sharded[name] = parameter

    def _move_replicated(self, model: BlockModel) -> None:
        """Move replicated parameters to the device, even if the shards are offloaded."""
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(self.group.device)

    def _block(self, model: BlockModel, i: int) -> ShardedBlock:
        prefix = f"resblocks.{i}."
        shards = [p for name, p in self.parameters.items() if name.startswith(prefix)]
        return ShardedBlock(cast(ScaledBlock, model.resblocks[i]), shards)

    @staticmethod
    def _prefetch(model: BlockModel) -> None:
        """Gather the next resblock's weights while one computes, in the forward and the backward pass."""
        blocks = [cast(FSDPModule, block) for block in model.resblocks]
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])

    def _sum_between_nodes(self, update: int) -> None:
        """Sum the sharded gradients over the nodes.

        Gradients that will be skipped (see ``GradientScaling``) must not reach PowerSGD's error buffers, which keep
        their values (paper, appendix E.2). So the ranks first agree on the scales under which any of them has a
        non-finite gradient, for which the host waits. All gradients under these become NaN on all ranks.
        """
        gradients, scaling = {name: cast(Tensor, self.parameters[name].grad) for name in self._sharded}, self.scaling
        averaged = {n for n in gradients if scaling is not None and scaling.scales_gradient_of(self.parameters[n])}
        if not self.between_nodes.compresses:
            self.between_nodes.sum(gradients, update, averaged)
            return
        index = {name: 0 if scaling is None else scaling.scale_index(p) for name, p in self.parameters.items()}
        scales = [1.0] if scaling is None else scaling.values().tolist()
        all_finite = self._finite([index[name] for name in self.parameters], len(scales))
        finite, used = all_finite.tolist(), (all_finite if scaling is None else scaling.used(all_finite)).tolist()
        for name, gradient in gradients.items():
            if not finite[index[name]]:
                gradient.fill_(torch.nan)
        summed = {name: gradient for name, gradient in gradients.items() if used[index[name]]}
        # So far, scaled gradients are averaged over their node alone.
        nodes = self.nodes.across.size
        factors = {name: scales[index[name]] * (nodes if name in averaged else 1) for name in summed}
        self.between_nodes.sum(summed, update, averaged, factors)

    def _finite(self, indices: list[int], count: int) -> Tensor:
        """Return for each of ``count`` scales whether all gradients under it are finite on all ranks, (count,) bool.

        ``indices`` has the index of each parameter's scale.
        """
        flags = [(~cast(Tensor, p.grad).isfinite().all()).to(self.group.device) for p in self.parameters.values()]
        found = torch.zeros(count, device=self.group.device)
        found.index_add_(0, torch.tensor(indices, device=found.device), torch.stack(flags).float())
        return self.group.sum(found) == 0


def count_traffic(module: FSDPModule, traffic: Traffic) -> None:
    """Have ``module`` add to ``traffic`` the bytes of the shards it gathers and the gradients it reduce-scatters."""
    module.set_custom_all_gather(_AllGather(traffic))  # type: ignore[arg-type]
    module.set_custom_reduce_scatter(_ReduceScatter(traffic))  # type: ignore[arg-type]


class _CountingCollective:
    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_CountingCollective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        self.traffic.bytes += input_tensor.nbytes
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_CountingCollective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        self.traffic.bytes += input_tensor.nbytes
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
