"""An image cut into blocks of queries, each with the window of keys that its queries may look at.

A block is some whole rows of the image, its window those rows and some rows above them. So sparse attention becomes
dense products, of a block's queries and its window's keys, with a bias for what the pattern leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Blocks of ``rows`` rows of a ``grid`` x ``grid`` image, with windows that begin ``above`` rows before them.

    ``rows`` divides ``grid``; ``above`` is at most ``grid - rows``. ``offsets`` are the raster offsets, a query's
    index less a key's, at which a query may look.
    """

    grid: int
    rows: int
    above: int
    offsets: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return self.grid // self.rows

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return self.rows * self.grid

    @property
    def keys(self) -> int:
        """Keys of a window."""
        return (self.above + self.rows) * self.grid

    def cut(self, image: Tensor) -> Tensor:
        """Keys or values (N, S, D) of N images -> (N * blocks, keys, D) of the windows; rows above the image are 0."""
        if self.above == 0:
            return image.reshape(-1, self.keys, image.shape[-1])
        n, _, width = image.shape
        rows = image.unflatten(1, (self.grid, self.grid))
        windows = image.new_empty(n, self.blocks, self.above + self.rows, self.grid, width)
        windows[:, :, self.above :] = rows.unflatten(1, (self.blocks, self.rows))
        for place, blocks, seen in self._rows_above():
            windows[:, : blocks.start, place] = 0
            windows[:, blocks, place] = rows[:, seen]
        return windows.view(n * self.blocks, self.keys, width)

    def join(self, windows: Tensor) -> Tensor:
        """The adjoint of ``cut``: adds up what stands in several windows for one row."""
        if self.above == 0:
            return windows.view(-1, self.grid**2, windows.shape[-1])
        parts = windows.view(-1, self.blocks, self.above + self.rows, self.grid, windows.shape[-1])
        rows = parts[:, :, self.above :].flatten(1, 2).contiguous()
        for place, blocks, seen in self._rows_above():
            rows[:, seen] += parts[:, blocks, place]
        return rows.flatten(1, 2)

    def _rows_above(self) -> Iterator[tuple[int, slice, slice]]:
        """For each place of a window above its block: which blocks have a row of the image there, and which rows."""
        for place in range(self.above):
            back = self.above - place
            first = -(-back // self.rows)
            yield place, slice(first, None), slice(first * self.rows - back, self.grid - back, self.rows)


@lru_cache(maxsize=64)
def window_bias(windows: Windows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(blocks, queries, keys): 0 where a query may look, -inf elsewhere and above the image."""
    with torch.inference_mode(False):  # the cached tensor must serve training too
        query = torch.arange(windows.queries)[:, None] + windows.above * windows.grid
        key = torch.arange(windows.keys)
        allowed = torch.isin(query - key, torch.tensor(windows.offsets))
        row = key // windows.grid - windows.above + torch.arange(windows.blocks)[:, None] * windows.rows
        bias = torch.zeros(windows.blocks, windows.queries, windows.keys, dtype=dtype)
        return bias.masked_fill_(~(allowed & (row >= 0)[:, None]), -math.inf).to(device)
