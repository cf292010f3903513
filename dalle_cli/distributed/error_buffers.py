"""PowerSGD's buffers between updates: error buffers and factors, in 16 bit or in the host's memory to save space.

The paper stores error buffers and factors in the custom 16-bit format 1-6-9 too (appendix E.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dalle_cli.precision.formats import MEAN

CHUNK = 2**20
"""Number of values encoded or decoded at once, which bounds the temporary memory."""


class ErrorBuffers:
    """Tensors by key, read and written as float32 whatever their stored type.

    With ``on_host`` they are in the host's memory, page-locked if there is a GPU, for the bus's full rate.
    """

    def __init__(self, on_host: bool = False) -> None:
        self.on_host = on_host
        self._tensors: dict[str, Tensor] = {}

    def read(self, key: str, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Return the tensor ``key`` of ``shape`` on ``device``, or None if there is none.

        A tensor that is stored on ``device`` in 32 bit is returned itself, not a copy.
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
        """Store contiguous float32 ``values`` as ``key``, in 16 bit if ``packed``.

        With ``noise`` they are rounded stochastically, without it to nearest. In 32 bit they may be stored without a
        copy, so do not change them afterwards.
        """
        device = torch.device("cpu") if self.on_host else values.device
        if not packed and values.device == device:
            self._tensors[key] = values
            return
        buffer = self._buffer(key, values, torch.uint16 if packed else torch.float32, device)
        if not packed:
            buffer.copy_(values)
            return
        for codes, part in zip(buffer.view(-1).split(CHUNK), values.view(-1).split(CHUNK), strict=True):
            drawn = None
            if noise is not None:
                drawn = torch.empty(len(part), dtype=torch.int32, device=part.device).random_(generator=noise)
            codes.copy_(MEAN.encode(part, drawn))

    def clear(self, keys: Iterable[str]) -> None:
        """Delete the tensors ``keys`` if they are stored."""
        for key in keys:
            self._tensors.pop(key, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors as stored, float32 or uint16 codes, without copying them."""
        return dict(self._tensors)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        self._tensors = {key: tensor.clone() for key, tensor in tensors.items()}

    def _buffer(self, key: str, values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the buffer of ``key``, newly allocated if the stored one does not fit, as after resuming."""
        locked = self.on_host and values.device.type == "cuda"
        buffer = self._tensors.get(key)
        fits = buffer is not None and (buffer.shape, buffer.dtype, buffer.device) == (values.shape, dtype, device)
        if buffer is None or not fits or (locked and not buffer.is_pinned()):
            buffer = torch.empty(values.shape, dtype=dtype, device=device, pin_memory=locked)
            self._tensors[key] = buffer
        return buffer
