"""How fast training goes: samples and tokens a second, and the share of the device's peak that the model gets (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

PACE = ("samples_per_second", "tokens_per_second", "tflops", "mfu")
"""What ``Pace`` measures: ``tflops`` and ``mfu`` are a device's."""
CPU_SIDE, GPU_SIDE, TRIALS = 512, 8192, 3
"""Of the square product that stands for the peak."""


@dataclass(frozen=True)
class SampleWork:
    """What a training sample takes: tokens, and FLOPs of the model in products of ``dtype``."""

    tokens: int
    flops: float
    dtype: torch.dtype = torch.float32


def training_flops(forward: Callable[[], object]) -> float:
    """FLOPs of a forward and backward pass whose forward pass is ``forward``; on the meta device nothing is computed.

    They are those of its matrix products and convolutions, a multiplication and an addition counted as two. The
    backward pass has twice as many as the forward pass; what is computed again for want of memory does not count
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return 3.0 * float(counter.get_total_flops())


def peak_tflops(given: float | None, dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    """The device's peak in TFLOP/s, and in words where it comes from: the recipe, or else one measurement."""
    if given is not None:
        return given, "as monitoring.peak_tflops says"
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    found = _measure(side, dtype, device, torch.get_num_threads())
    kind = str(dtype).removeprefix("torch.")
    return found, f"measured by a {kind} product of {side} x {side}{threads}; monitoring.peak_tflops sets it"


@cache
def _measure(side: int, dtype: torch.dtype, device: torch.device, _threads: int) -> float:
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(1 + TRIALS):  # the first one warms up
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return 2 * side**3 / min(taken[1:]) / 1e12


class Pace:
    """The pace of updates of ``batch_size`` samples by ``devices`` together, from one ``measure`` to the next."""

    def __init__(self, work: SampleWork, batch_size: int, devices: int, peak: float) -> None:
        self.work, self.batch_size, self.devices, self.peak = work, batch_size, devices, peak
        self._updates, self._began = 0, time.monotonic()

    def advance(self) -> None:
        """An update is done."""
        self._updates += 1

    def leave_out(self, seconds: float) -> None:
        """So long something else than updates was done: validation, saving."""
        self._began += seconds

    def measure(self) -> dict[str, float]:
        """``PACE`` of the updates since the last call."""
        now = time.monotonic()
        rate = self._updates * self.batch_size / max(now - self._began, 1e-9)
        self._updates, self._began = 0, now
        tflops = rate * self.work.flops / self.devices / 1e12
        return dict(zip(PACE, (rate, rate * self.work.tokens, tflops, tflops / self.peak), strict=True))
