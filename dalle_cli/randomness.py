"""Counter-based randomness: every random draw is a function of (seed, what it is for, its index).

Nothing reads a global generator's state, so that resuming and the number of workers change no result.
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

    SHA-256 hashes the parts with their types and boundaries: ``("a", "b")``, ``("ab",)``, ``(1,)`` and ``("1",)``
    are four streams.

    Raises:
        TypeError: a part is neither str nor int.
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
    """Return pseudorandom uint64 values of the uint64 values ``x``, elementwise.

    This is the output function of the generator splitmix64 (Steele et al. 2014), a bijection. Its i-th draw, from
    i = 1 on, is ``splitmix64(seed + i * SPLITMIX_STEP)``.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: np.ndarray = x ^ (x >> np.uint64(31))
    return result
