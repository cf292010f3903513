"""Contenders timed by turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from dalle_cli.distributed.device import fast_matmul

SIDE = 2048
"""Side of the square matrix product that stands for the machine's peak."""


@dataclass(frozen=True)
class Contender:
    """``work`` is timed with 32-bit products as ``dalle`` runs them (``fast``), or as PyTorch does by default."""

    work: Callable[[], object]
    fast: bool = True

    def products(self) -> AbstractContextManager[object]:
        return fast_matmul() if self.fast else nullcontext()


def race(contenders: dict[str, Contender], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each contender, over ``rounds`` after two that warm up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 2):
        for name, contender in contenders.items():
            with contender.products():
                _finish(device)
                began = time.perf_counter()
                contender.work()
                _finish(device)
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[2:]) for name, times in taken.items()}


def libraries() -> tuple[str, ...]:
    """Names of the libraries that 32-bit products can run on here, the one that ``dalle`` takes first."""
    with fast_matmul() as library:
        return (library, "MKL") if library == "oneDNN" else (library,)


def square_product(dtype: torch.dtype, device: str) -> Callable[[], object]:
    """The product whose speed stands for the machine's peak."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
