"""A mean over machines of numbers that cross in 16 bit, in the format 1-6-9 (paper, section 2.4 and appendix E.2).

Sums are not taken in 16 bit: each machine gets one part of everybody's codes, takes its mean in 32 bit, and hands the
mean's codes to all. So nothing overflows on the way, every number is rounded twice however many machines there are, and
all machines come to the same bytes. A machine sends (k - 1) / k of its codes to k - 1 others, twice, which is what a
ring of all-reduce sends of as many bytes.

Numbers are rounded to the nearest code. What a machine's own rounding takes away it knows, and can send later. That of
the mean, 2^-10 of a normal number at most, is lost; but means are of no sum that goes on from update to update, so
nothing small is lost time after time, as it would be in what is kept.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_cli.distributed import error_buffers as kept
from dalle_cli.precision.formats import MEAN

NOT_FINITE = -(2**15)
"""The code of minus zero, which no number needs; the format has none for infinities and NaN."""


def to_codes(values: Tensor, parts: int = 1) -> Tensor:
    """The nearest codes of float32 ``values`` (n,), and zeros behind them: int16, of the least multiple of ``parts``
    that is n or more.

    What is beyond the format's largest number, just below 16, becomes that number; infinities and NaN are NOT_FINITE.
    """
    # Few operations know uint16.
    codes = torch.zeros(-(-len(values) // parts) * parts, dtype=torch.int16, device=values.device)
    for part, place in zip(values.split(kept.CHUNK), codes[: len(values)].split(kept.CHUNK), strict=True):
        found = MEAN.encode(part).view(torch.int16)
        found.masked_fill_(found == NOT_FINITE, 0).masked_fill_(~part.isfinite(), NOT_FINITE)
        place.copy_(found)
    return codes


def to_values(codes: Tensor, values: Tensor) -> None:
    """Set float32 ``values`` (n,) to what the first n ``codes`` stand for, NaN for NOT_FINITE."""
    for part, place in zip(codes[: len(values)].split(kept.CHUNK), values.split(kept.CHUNK), strict=True):
        place.copy_(_decoded(part))


def average_codes(codes: Tensor, group: dist.ProcessGroup) -> None:
    """Replace ``codes``, a multiple of the ``group``'s k machines, by those of the mean over them, the same on all.

    A number that is not finite at one machine comes out as NOT_FINITE at all.
    """
    machines = dist.get_world_size(group)
    received = torch.empty_like(codes)
    # Bytes, which every backend takes.
    dist.all_to_all_single(received.view(torch.uint8), codes.view(torch.uint8), group=group)
    for chunk in received.view(machines, -1).split(kept.CHUNK, dim=1):
        mean = _decoded(chunk[0])
        for of_machine in chunk[1:]:
            mean += _decoded(of_machine)
        # To each machine in place of what came from it.
        chunk.copy_(to_codes(mean.div_(machines)))
    dist.all_to_all_single(codes.view(torch.uint8), received.view(torch.uint8), group=group)


def _decoded(codes: Tensor) -> Tensor:
    return MEAN.decode(codes.view(torch.uint16)).masked_fill_(codes == NOT_FINITE, torch.nan)
