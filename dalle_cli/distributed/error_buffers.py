"""What PowerSGD keeps from one update to the next, in few bytes: 1-6-9 codes, and in the host's memory where told.

The paper keeps errors and factors in a custom 16-bit format too (appendix E.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dalle_cli.precision.formats import MEAN

CHUNK = 2**20
"""Values encoded or decoded at once, which bounds what that takes besides."""


class Kept:
    """Tensors by key, float32 to whoever reads and writes them.

    Args:
        on_host: whether they wait in the host's memory. On the way to and from a GPU it is page-locked, which is what
            lets them cross at the bus's full rate.
    """

    def __init__(self, on_host: bool = False) -> None:
        self.on_host = on_host
        self._tensors: dict[str, Tensor] = {}

    def read(self, key: str, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """The tensor ``key`` on ``device``, None if there is none. One that waits there in 32 bit is no copy.

        Raises:
            ValueError: it is of another shape.
        """
        found = self._tensors.get(key)
        if found is None:
            return None
        if found.shape != shape:
            raise ValueError(f"PowerSGD's {key} is {tuple(found.shape)}, its shard and rank make it {shape}")
        if found.dtype != torch.uint16:
            return found.to(device)
        values = torch.empty(shape, device=device)
        for codes, part in zip(found.view(-1).split(CHUNK), values.view(-1).split(CHUNK), strict=True):
            part.copy_(MEAN.decode(codes.to(device)))
        return values

    def write(self, key: str, values: Tensor, packed: bool, noise: torch.Generator | None = None) -> None:
        """Keep contiguous float32 ``values`` as ``key``.

        Args:
            key: what they are read by.
            values: not to be changed afterwards, but by whoever reads them.
            packed: in 16 bit.
            noise: then round by it as ``Format.encode`` does, else to the nearest.
        """
        place = torch.device("cpu") if self.on_host else values.device
        if not packed and values.device == place:
            self._tensors[key] = values
            return
        kept = self._place(key, values, torch.uint16 if packed else torch.float32, place)
        if not packed:
            kept.copy_(values)
            return
        for codes, part in zip(kept.view(-1).split(CHUNK), values.view(-1).split(CHUNK), strict=True):
            drawn = None
            if noise is not None:
                drawn = torch.empty(len(part), dtype=torch.int32, device=part.device).random_(generator=noise)
            codes.copy_(MEAN.encode(part, drawn))

    def forget(self, keys: Iterable[str]) -> None:
        """Those of ``keys`` that are there."""
        for key in keys:
            self._tensors.pop(key, None)

    def tensors(self) -> dict[str, Tensor]:
        """All, as they wait: float32, or uint16 codes. They are not copies."""
        return dict(self._tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what ``tensors`` gave."""
        self._tensors = {key: tensor.clone() for key, tensor in tensors.items()}

    def _place(self, key: str, values: Tensor, dtype: torch.dtype, place: torch.device) -> Tensor:
        """Where ``key`` waits, made anew where it is of another kind or elsewhere, as a checkpoint's is at first."""
        locked = self.on_host and values.device.type == "cuda"
        kept = self._tensors.get(key)
        fits = kept is not None and (kept.shape, kept.dtype, kept.device) == (values.shape, dtype, place)
        if kept is None or not fits or (locked and not kept.is_pinned()):
            kept = torch.empty(values.shape, dtype=dtype, device=place, pin_memory=locked)
            self._tensors[key] = kept
        return kept
