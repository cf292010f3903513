"""Copies between the host's memory and a GPU's that run while the host goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to ``device``; a copy from the host's memory to a GPU runs while this process goes on."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class OnItsWay:
    """Values that are being copied to the host's memory; ``arrival`` is None if they are there."""

    values: Tensor
    arrival: torch.cuda.Event | None

    @staticmethod
    def of(values: Tensor) -> OnItsWay:
        """Begin to copy ``values``, a scalar or a vector, if they are on a GPU."""
        if values.device.type != "cuda":
            return OnItsWay(values.detach(), None)
        arrival, copied = torch.cuda.Event(), values.detach().to("cpu", non_blocking=True)
        arrival.record()
        return OnItsWay(copied, arrival)

    def read(self) -> list[float]:
        """Return the values once they have arrived."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.values.reshape(-1).tolist()
