"""Counts what ``fully_shard`` hands to its collectives, which otherwise work as by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dalle_cli.training.parallel import Traffic


def count_traffic(module: FSDPModule, traffic: Traffic) -> None:
    """Have ``traffic`` grow by the bytes of this process's shards that are gathered and of the gradients that are
    scattered."""
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
