"""An all-reduce (mean) over nodes that sends numbers in the 16-bit format 1-6-9 (paper, appendix E.2).

Nothing is added up in 16 bit. Each node receives one part of every node's codes, averages it in 32 bit and sends the
codes of the mean to all. So no sum overflows, each number is rounded exactly twice with any number of nodes, and all
nodes end with the same bytes. Each of k nodes sends (k - 1) / k of its codes twice, as in a ring all-reduce.

Numbers are rounded to the nearest code. A node knows the error of its own rounding and can send it later. The error of
rounding the mean, at most 2^-10 of a normal number, is lost, but it does not accumulate from update to update.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_cli.distributed import error_buffers
from dalle_cli.precision.formats import MEAN

NOT_FINITE = -(2**15)
"""Code that stands for infinities and NaN, which 1-6-9 lacks. It is the code of minus zero, which no number needs."""


def encode(values: Tensor, multiple_of: int = 1) -> Tensor:
    """Encode float32 ``values`` (n,) as int16 codes, rounded to nearest and zero-padded to a multiple.

    Numbers beyond the format's largest, just below 16, become that number. Infinities and NaN become NOT_FINITE.
    """
    # The type is int16 because few operations support uint16.
    codes = torch.zeros(-(-len(values) // multiple_of) * multiple_of, dtype=torch.int16, device=values.device)
    chunk = error_buffers.CHUNK
    for part, target in zip(values.split(chunk), codes[: len(values)].split(chunk), strict=True):
        found = MEAN.encode(part).view(torch.int16)
        found.masked_fill_(found == NOT_FINITE, 0).masked_fill_(~part.isfinite(), NOT_FINITE)
        target.copy_(found)
    return codes


def decode(codes: Tensor, out: Tensor) -> None:
    """Write the numbers that the first n ``codes`` stand for to float32 ``out`` (n,); NOT_FINITE becomes NaN."""
    chunk = error_buffers.CHUNK
    for part, target in zip(codes[: len(out)].split(chunk), out.split(chunk), strict=True):
        target.copy_(_decode(part))


def all_reduce_mean(codes: Tensor, group: dist.ProcessGroup) -> None:
    """Replace int16 ``codes`` by the codes of their mean over ``group``, the same bytes on every rank.

    Their number must be a multiple of the group's size. Where any rank has NOT_FINITE, all ranks get it.
    """
    nodes = dist.get_world_size(group)
    received = torch.empty_like(codes)
    # Sent as bytes, a type that every backend supports.
    dist.all_to_all_single(received.view(torch.uint8), codes.view(torch.uint8), group=group)
    for chunk in received.view(nodes, -1).split(error_buffers.CHUNK, dim=1):
        mean = _decode(chunk[0])
        for other in chunk[1:]:
            mean += _decode(other)
        # Each node gets the mean in place of the codes that came from it.
        chunk.copy_(encode(mean.div_(nodes)))
    dist.all_to_all_single(codes.view(torch.uint8), received.view(torch.uint8), group=group)


def _decode(codes: Tensor) -> Tensor:
    return MEAN.decode(codes.view(torch.uint16)).masked_fill_(codes == NOT_FINITE, torch.nan)
