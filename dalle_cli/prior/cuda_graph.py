"""The decoding step as one CUDA graph: on a GPU its many small operations are launched together.

A graph repeats the same operations on the same memory. So a step has its position and tokens in tensors here, and reads
as many slots at each position as its kind ever does, with a bias that hides those that do not count.
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

CLOSE = 0.05
"""How far logits of a graph may be from those of a step by itself: more than 16 bit round, less than an error makes."""


def stepper(decoder: Decoder, cache: Cache) -> Callable[[int, Tensor], Tensor]:
    """``decoder.step`` of ``cache``: on a CPU as it is, on a GPU by a graph."""
    return by_graph(decoder, cache) if decoder.device.type == "cuda" else partial(decoder.step, cache)


def by_graph(decoder: Decoder, cache: Cache) -> Callable[[int, Tensor], Tensor]:
    """``decoder.step`` by a graph that the first step makes, or as it is where none can be made. What it returns is
    overwritten by the next step.
    """
    static = StaticStep(decoder, cache)
    run: Callable[[int, Tensor], Tensor] | None = None

    def step(position: int, token: Tensor) -> Tensor:
        nonlocal run
        if run is None:
            wanted = decoder.step(cache, position, token)
            try:
                run = static.captured(position, token)
                if not torch.allclose(run(position, token), wanted, rtol=CLOSE, atol=CLOSE):
                    raise RuntimeError("its logits are others")
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                log(f"sample: no CUDA graph could be made of a step ({reason}); its operations are launched singly")
                run = partial(decoder.step, cache)
            return wanted
        return run(position, token)

    return step


class StaticStep:
    """``decoder.step`` of ``cache`` in fixed shapes. Slots not yet written must hold numbers: they are read as well."""

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
        self._put(position, token)
        return self._run()

    @torch.inference_mode()
    def captured(self, position: int, token: Tensor) -> Callable[[int, Tensor], Tensor]:
        """The same by a graph, captured on the first step, which may run any number of times."""
        self._put(position, token)
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
            self._put(position, token)
            graph.replay()
            return logits

        return replay

    def _put(self, position: int, token: Tensor) -> None:
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
    """For each of S positions: the slot it is written to (S, 1), L slots that it reads (S, L), and what is added to
    their scores (S, L), 0 or -inf. L is grid for ``column``, else all slots.
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
