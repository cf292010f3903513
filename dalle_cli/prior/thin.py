"""Products of few rows with matrices that are used once, as a decoding step has them with the keys and values it reads.

Nothing is used again there, so a product can be as fast as the memory. PyTorch's libraries for products are not: in 16
bit they rearrange a matrix before they multiply. Its bags of embeddings are sums of rows by weights too, and read the
rows as they lie.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 8
"""With more rows than this it pays to use a matrix for several of them at once."""
LEAST = {torch.bfloat16: 2**14, torch.float32: 2**18}
"""From so many numbers of all matrices on, bags are faster: smaller products are bound by their start, and in 32 bit
lie in the processor's cache."""


def thin_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm`` of a (S, n, K) and b (S, K, N), fast for small n where b's rows lie one behind the other; forward
    only."""
    streams, n, inner = a.shape
    width = b.shape[-1]
    pitch, rest = divmod(b.stride(0), width)
    in_rows = b.stride()[1:] == (width, 1) and rest == 0
    if n > FEW or b.numel() < LEAST.get(b.dtype, math.inf) or not in_rows or not has_bags(b.device):
        return torch.bmm(a, b)
    rows = b.as_strided(((streams - 1) * pitch + inner, width), (width, 1))
    places, bags = _places(streams, n, inner, pitch)
    return F.embedding_bag(places, rows, bags, mode="sum", per_sample_weights=a.reshape(-1)).view(streams, n, width)


@lru_cache(maxsize=8)
def has_bags(device: torch.device) -> bool:
    """Whether bags of embeddings are compiled for this processor: by FBGEMM."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


@lru_cache(maxsize=8)  # as many as are in use at a time: those of each kind of attention
def _places(streams: int, n: int, inner: int, pitch: int) -> tuple[Tensor, Tensor]:
    """For each number of a, which row it counts, of matrices that begin ``pitch`` rows apart; and where in them the
    numbers of each of the S n sums begin."""
    first = torch.arange(streams, dtype=torch.int32).repeat_interleave(n) * pitch
    places = (first[:, None] + torch.arange(inner, dtype=torch.int32)).flatten()
    return places, torch.arange(0, len(places), inner, dtype=torch.int32)
