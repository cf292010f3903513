"""The sum of shards' gradients over nodes, whole or compressed, for engines that shard a model inside a node."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from dalle_cli.config.schema import PowerSgd
from dalle_cli.distributed.group import Nodes
from dalle_cli.distributed.power_sgd import PowerSgdReducer
from dalle_cli.progress import log


class BetweenNodes:
    """Sums gradients over the ranks that hold the same shards, one in each node; see ``Engine`` for its other methods.

    Args:
        nodes: all ranks.
        powersgd: the recipe's settings; the paper compresses with them what is sent between nodes (section 2.5).
        columns: the number of columns of each matrix that may be compressed, by its name.
        seed: the seed of PowerSGD's factors and rounding.
    """

    def __init__(self, nodes: Nodes, powersgd: PowerSgd, columns: Mapping[str, int], seed: int) -> None:
        self.nodes, self.across = nodes, nodes.across
        self.reducer: PowerSgdReducer | None = None
        if powersgd.rank and self.across.size > 1:
            self.reducer = PowerSgdReducer(
                powersgd, self.across.process_group, columns, nodes.inside.size, seed, nodes.world.device
            )

    @property
    def compresses(self) -> bool:
        return self.reducer is not None

    def sum(
        self,
        gradients: Mapping[str, Tensor],
        update: int,
        averaged: Collection[str] = (),
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Replace each gradient by its sum over the nodes, ``averaged`` ones by the mean, or by an approximation of it.

        All nodes must name the same gradients. ``scales`` are the factors that they were multiplied by.
        """
        if self.across.size == 1:
            return
        summed = [gradient for name, gradient in gradients.items() if name not in averaged]
        if self.reducer is None:
            self.across.sum_in_place(summed)
            self.across.average_in_place(gradients[name] for name in gradients if name in averaged)
            return
        self.reducer.reduce(gradients.items(), update, scales)
        for gradient in summed:
            gradient.mul_(self.across.size)

    def require_same_weights(self, weights: Iterable[Tensor]) -> None:
        """Raise UserError if the nodes' weights differ, since only the first node's are saved."""
        if self.across.size == 1:
            return
        digest = hashlib.sha256()
        for weight in weights:
            digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
        self.across.require_same("weights", digest.hexdigest())

    def state(self) -> dict[str, Tensor]:
        """Return PowerSGD's state on this rank, without the errors that ``share_errors`` yields."""
        state = {} if self.reducer is None else self.reducer.state_dict()
        return {key: value for key, value in state.items() if key.startswith("factor.")}

    def load_state(self, state: Mapping[str, Tensor] | None, shards: Mapping[str, Tensor]) -> None:
        """Restore what ``state`` returned of these ``shards``; the other factors begin anew.

        The state in a checkpoint of an earlier version has this rank's errors too.
        """
        if self.reducer is None or not state:
            return
        fitting = {key: value for key, value in state.items() if _fits(self.reducer, key, value, shards)}
        self.reducer.load_state_dict(fitting)
        if len(fitting) < len(state):
            lost = len(state) - len(fitting)
            log(f"prior.powersgd: {lost} of {len(state)} factors are of other shards than these, and are dropped")

    def share_errors(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield PowerSGD's errors for a checkpoint; see ``PowerSgdReducer.share_errors``."""
        return iter(()) if self.reducer is None else self.reducer.share_errors(shards)

    def load_errors(self, saved: Iterable[tuple[str, Tensor]], shards: Mapping[str, Tensor]) -> None:
        """Restore the errors that ``share_errors`` yielded, on any number of nodes; one node alone drops them."""
        if self.reducer is None:
            log("prior.powersgd: nothing is compressed here; the checkpoint's errors are dropped")
            return
        for name, total in saved:
            self.reducer.load_error(name, total, shards[name])

    def traffic(self) -> dict[str, int]:
        """Return the bytes that this rank has sent to any rank and, if there are several nodes, to other nodes."""
        across = self.across.traffic.bytes + (0 if self.reducer is None else self.reducer.bytes_sent)
        counted = {"bytes_communicated": self.nodes.world.traffic.bytes + self.nodes.inside.traffic.bytes + across}
        return {**counted, "bytes_between_nodes": across} if self.across.size > 1 else counted


def _fits(reducer: PowerSgdReducer, key: str, value: Tensor, shards: Mapping[str, Tensor]) -> bool:
    """Return whether a part of PowerSGD's state has the shape that this rank's shard needs."""
    kind, _, name = key.partition(".")
    shape = reducer.matrix_shape(name, shards[name]) if name in shards else None
    return shape is not None and value.shape == (shape if kind == "error" else reducer.factor_shape(shape))
