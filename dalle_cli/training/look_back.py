"""Values of an update that are looked at an update later, so that the processor never waits for a GPU's newest work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from dalle_cli.distributed.group import Group
from dalle_cli.transfers import OnItsWay


class LookBack:
    """The losses, and the stop requests of several ranks, looked at one update late on a GPU and at once on a CPU."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._lag = 1 if group.device.type == "cuda" else 0
        self._losses: deque[tuple[int, OnItsWay]] = deque()
        self._requests: deque[OnItsWay] = deque()

    def note_loss(self, update: int, loss: Tensor) -> None:
        """Note the ``loss``, a scalar, of the update with this number."""
        self._losses.append((update, OnItsWay.of(loss)))

    def losses(self, *, every: bool = False) -> Iterator[tuple[int, float]]:
        """Yield the noted losses, each once, with their updates; ``every`` includes one that must be waited for."""
        while len(self._losses) > (0 if every else self._lag):
            update, loss = self._losses.popleft()
            yield update, loss.read()[0]

    def any_request(self, requested: bool) -> bool:
        """Return whether any rank has ``requested`` to stop, the same on all ranks; all call this after each update."""
        if self.group.size == 1:
            return requested
        self._requests.append(OnItsWay.of(self.group.sum(torch.tensor(float(requested)))))
        return len(self._requests) > self._lag and self._requests.popleft().read()[0] > 0
