"""The decoding step as one CUDA graph, which launches its many small operations together.

A graph repeats the same operations on the same memory. So the position and tokens are in tensors, and each kind of
attention reads the same number of slots at every position, with a bias that masks the excess ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.prior.decode import Cache, Decoder, Slots, attend_slots
from dalle_cli.progress import log

TOLERANCE = 0.05
"""Tolerance between a graph's and a plain step's logits: above 16-bit rounding, below the effect of an error."""


def fast_step(decoder: Decoder, cache: Cache) -> Callable[[int, Tensor], Tensor]:
    """Return ``decoder.step`` of ``cache``, as a CUDA graph if the decoder is on a GPU."""
    return graph_step(decoder, cache) if decoder.device.type == "cuda" else partial(decoder.step, cache)


def graph_step(decoder: Decoder, cache: Cache) -> Callable[[int, Tensor], Tensor]:
    """Return ``decoder.step`` of ``cache`` as a CUDA graph that the first step captures.

    If that fails, or its logits are wrong, the plain step is used. Each step overwrites the last result.
    """
    static = StaticStep(decoder, cache)
    run: Callable[[int, Tensor], Tensor] | None = None

    def step(position: int, token: Tensor) -> Tensor:
        nonlocal run
        if run is None:
            plain = decoder.step(cache, position, token)
            try:
                run = static.capture(position, token)
                if not torch.allclose(run(position, token), plain, rtol=TOLERANCE, atol=TOLERANCE):
                    raise RuntimeError("its logits differ from a plain step's")
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                log(f"sample: no CUDA graph of the decoding step ({reason}); its operations are launched one by one")
                run = partial(decoder.step, cache)
            return plain
        return run(position, token)

    return step


class StaticStep:
    """``decoder.step`` of ``cache`` in fixed shapes; it reads unwritten slots too, which must hold finite numbers."""

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self.decoder, self.cache = decoder, cache
        _, captions, _, n, _, _ = cache.image[0].shape
        self.position = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self.token = torch.zeros(captions, n, dtype=torch.int64, device=decoder.device)
        self.tables = {
            slots: tuple(table.to(decoder.device) for table in slot_tables(slots, decoder.dtype))
            for slots in {layer.slots for layer in decoder.layers}
        }

    @torch.inference_mode()
    def __call__(self, position: int, token: Tensor) -> Tensor:
        self._set_inputs(position, token)
        return self._run()

    @torch.inference_mode()
    def capture(self, position: int, token: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Capture the step as a CUDA graph, and return a function that replays it at any position."""
        self._set_inputs(position, token)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            self._run()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run()

        @torch.inference_mode()
        def replay(position: int, token: Tensor) -> Tensor:
            self._set_inputs(position, token)
            graph.replay()
            return logits

        return replay

    def _set_inputs(self, position: int, token: Tensor) -> None:
        self.position.fill_(position)
        self.token.copy_(token)

    def _run(self) -> Tensor:
        decoder = self.decoder
        x = F.embedding(self.token, decoder.image_embedding) + decoder.image_position.index_select(0, self.position)
        for layer, text, image in zip(decoder.layers, self.cache.text, self.cache.image, strict=True):
            write, read, bias = (table.index_select(0, self.position)[0] for table in self.tables[layer.slots])
            q, _, _ = kv = layer.heads_of(x).permute(2, 0, 3, 1, 4)
            image.index_copy_(4, write, kv[1:].unsqueeze(4))
            readable = image if len(read) == image.shape[4] else image.index_select(4, read)
            x = layer.finish(x, attend_slots(q, text, readable, bias))
        return decoder.head(decoder.norm(x))


def slot_tables(slots: Slots, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slot (S, 1) that each position writes, the slots (S, L) it reads, and their bias (S, L), 0 or -inf.

    L is the side of the grid for ``column``, else the number of slots.
    """
    positions = torch.arange(slots.grid**2)
    write = torch.tensor([[slots.write(p)] for p in positions.tolist()])
    if slots.kind == "column":
        first, length = write // slots.grid * slots.grid, slots.grid
    else:
        first, length = torch.zeros_like(write), slots.count
    read = first + torch.arange(length)
    stop = torch.tensor([[slots.read(p).stop] for p in positions.tolist()])
    bias = torch.zeros(read.shape, dtype=dtype).masked_fill_(read >= stop, -math.inf)
    own = slots.bias()
    return write, read, bias if own is None else bias + own.to(dtype)
