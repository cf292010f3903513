"""Time several contenders in alternation, so that other load on the machine slows all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from dalle_cli.distributed.device import fast_matmul
from dalle_cli.training.throughput import SLOW, peak_tflops

SIDE = 2048
"""Side of the square matmul whose speed is taken as the machine's peak."""


@dataclass(frozen=True)
class Contender:
    """A piece of work to time."""

    work: Callable[[], object]
    fast: bool = True
    """True to run fp32 matmuls in the library that ``dalle`` chooses, False to run them in PyTorch's default."""

    def matmuls(self) -> AbstractContextManager[object]:
        return fast_matmul() if self.fast else nullcontext()


def median_seconds(contenders: dict[str, Contender], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Return the median seconds of each contender over ``rounds``, after two rounds of warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 2):
        for name, contender in contenders.items():
            with contender.matmuls():
                _finish(device)
                began = time.perf_counter()
                contender.work()
                _finish(device)
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[2:]) for name, times in taken.items()}


def libraries() -> tuple[str, ...]:
    """Return the libraries that can run fp32 matmuls here, the one that ``dalle`` chooses first."""
    with fast_matmul() as library:
        return (library, "MKL") if library == "oneDNN" else (library,)


def slow_in_bf16(device: str) -> bool:
    """Return whether the device lacks instructions for bf16, so that a product takes up to a hundred times as long."""
    there = torch.device(device)
    return peak_tflops(torch.float32, there) > SLOW * peak_tflops(torch.bfloat16, there)


def square_matmul(dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Return a function that runs the matmul whose speed is taken as the machine's peak."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
