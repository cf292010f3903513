"""Counter-based randomness: every random draw is a function of (seed, purpose, index).

No global generator is used, so neither resuming nor the number of workers changes a result.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SPLITMIX_STEP = np.uint64(0x9E3779B97F4A7C15)


def stream_seed(seed: int, *what: str | int) -> int:
    """Return a 63-bit seed of the stream named by ``what``, e.g. ``stream_seed(0, "dvae", "gumbel", update)``.

    The SHA-256 covers types and boundaries: ``("a", "b")``, ``("ab",)``, ``(1,)`` and ``("1",)`` are four streams.
    """
    for part in (seed, *what):
        if isinstance(part, bool) or not isinstance(part, (str, int)):
            raise TypeError(f"a stream is named by str and int, not {type(part).__name__}")
    digest = hashlib.sha256(json.dumps([seed, *what]).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(seed: int, *what: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a torch generator at the start of the stream named by ``what``. CPU and GPU have different streams."""
    import torch

    return torch.Generator(device).manual_seed(stream_seed(seed, *what))


def numpy_generator(seed: int, *what: str | int) -> np.random.Generator:
    """Return a numpy generator (Philox) at the start of the stream named by ``what``."""
    return np.random.Generator(np.random.Philox(key=stream_seed(seed, *what)))


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Map uint64 values to pseudorandom uint64 values one to one: the output function of splitmix64.

    The generator's i-th draw, i >= 1, is ``splitmix64(seed + i * SPLITMIX_STEP)`` (Steele et al. 2014).
    """
    result: np.ndarray = x ^ (x >> np.uint64(30))
    result *= np.uint64(0xBF58476D1CE4E5B9)
    result ^= result >> np.uint64(27)
    result *= np.uint64(0x94D049BB133111EB)
    result ^= result >> np.uint64(31)
    return result


def drawn_below(numbers: np.ndarray, share: float) -> np.ndarray:
    """Return which of ``numbers``, random uint64 as of ``splitmix64``, are among the lowest ``share`` of all, bool."""
    below: np.ndarray = (numbers >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
    return below
