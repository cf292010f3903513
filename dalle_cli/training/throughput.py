"""Training throughput: samples and tokens per second, and the share of the device's peak that the model uses (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_cli.distributed.device import synchronize

THROUGHPUT_KEYS = ("samples_per_second", "tokens_per_second", "tflops", "mfu")
"""Names of the values that ``Throughput`` measures; ``tflops`` and ``mfu`` are per device."""
CPU_SIDE, GPU_SIDE, TRIALS = 512, 8192, 3
"""Sides of the square matrices, and number of products, that measure a device's peak."""
SLOW = 2.0
"""Factor above which bf16 products are so much slower than fp32's that no other operator makes up for it."""
MEANT_FOR = {torch.float16: "fp16 is for GPUs", torch.bfloat16: "bf16 is for processors with instructions for it"}
"""The purpose of each 16-bit type, as a warning names it."""


@dataclass(frozen=True)
class SampleWork:
    """Work in a training sample: its tokens, and the model's FLOPs in products of ``dtype``."""

    tokens: int
    flops: float
    dtype: torch.dtype = torch.float32


def training_flops(forward: Callable[[], object]) -> float:
    """Return the FLOPs of the pass that ``forward`` runs and of its backward pass.

    Only matrix products and convolutions count; a multiplication and an addition are two FLOPs. A backward pass has
    twice the FLOPs of the forward pass; recomputation does not count (Chowdhery et al. 2022, arXiv 2204.02311, B).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return 3.0 * float(counter.get_total_flops())


def peak_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """Return the device's peak in TFLOP/s for products of ``dtype``, measured once per process and thread count."""
    side = CPU_SIDE if device.type == "cpu" else GPU_SIDE
    return _measure_peak(side, dtype, device, torch.get_num_threads())


def precision_warning(key: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return a warning that says how slow ``dtype``, set by the recipe's ``key``, is on this CPU; None if it suits."""
    if dtype not in MEANT_FOR or device.type != "cpu":
        return None
    factor = peak_tflops(torch.float32, device) / peak_tflops(dtype, device)
    if dtype == torch.bfloat16 and factor <= SLOW:
        return None
    return f"{key}: {MEANT_FOR[dtype]}; a product takes {factor:.1f} times as long as in fp32 on this CPU"


@cache
def _measure_peak(side: int, dtype: torch.dtype, device: torch.device, _threads: int) -> float:
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + TRIALS):  # the first one warms up
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:]) / 1e12


class Throughput:
    """Measures throughput; ``batch_size`` is over all ``devices``, ``peak`` is one device's in TFLOP/s."""

    def __init__(self, work: SampleWork, batch_size: int, devices: int, peak: float) -> None:
        self.work, self.batch_size, self.devices, self.peak = work, batch_size, devices, peak
        self._updates, self._began = 0, time.monotonic()

    def count_update(self) -> None:
        """Count one update."""
        self._updates += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block's time, for validating or saving."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def measure(self) -> dict[str, float]:
        """Return the values of THROUGHPUT_KEYS over the updates since the last call."""
        now = time.monotonic()
        rate = self._updates * self.batch_size / max(now - self._began, 1e-9)
        self._updates, self._began = 0, now
        tflops = rate * self.work.flops / self.devices / 1e12
        values = (rate, rate * self.work.tokens, tflops, tflops / self.peak)
        return dict(zip(THROUGHPUT_KEYS, values, strict=True))
