"""Time each attention pattern, forward and backward, against dense attention with and without a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from dalle_cli.config.layout import AttentionKind
from dalle_cli.prior.attention import attend
from dalle_cli.prior.flex_attention import FlexAttention
from prior_parts.naive import mask_of
from prior_parts.timing import Contender, libraries, median_seconds

Log = Callable[[str], None]
KINDS: tuple[AttentionKind, ...] = ("row", "column", "conv")
GPU_BATCH, GPU_GOAL = 8, 2.5
"""Goal on a GPU: the speed-up over dense causal attention, which is flash attention there, at this batch size."""
GOALS = {
    ("row", "mask"): 4.0,
    ("column", "mask"): 4.0,
    ("conv", "mask"): 2.5,
    ("row", "causal"): 2.5,
    ("column", "causal"): 2.5,
}
"""Goals on a CPU: the speed-up of a pattern over dense attention with its mask or over dense causal attention."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the attention layer, and the number of timed rounds."""

    heads: int = 8
    d_head: int = 64
    grid: int = 32
    text_length: int = 256
    conv_kernel: int = 11
    batches: tuple[int, ...] = (1, 4)
    rounds: int = 9


def measure(sizes: Sizes, device: str, log: Log) -> dict[str, Any]:
    """Return rows with the milliseconds of each contender, and our speed-ups."""
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    names = libraries() if device == "cpu" else ("GPU",)
    for batch in sizes.batches:
        seconds_of = median_seconds(_contenders(sizes, batch, device, names), sizes.rounds, device)
        for name, seconds in seconds_of.items():
            rows.append({"batch": batch, "name": name, "ms": seconds * 1e3})
            log(f"attention  batch {batch}  {name:<34} {seconds * 1e3:8.1f} ms")
        for kind in KINDS:
            for library in names:
                for dense, other in (("mask", f"{kind} mask, SDPA"), ("causal", "causal, SDPA")):
                    ours, theirs = f"{kind}, dalle, {names[0]}", f"{other}, {library}"
                    ratio = {
                        "batch": batch,
                        "ours": ours,
                        "peer": theirs,
                        "ratio": seconds_of[theirs] / seconds_of[ours],
                    }
                    # The goals hold for batch 1, against PyTorch with the library that it chooses itself.
                    if device == "cpu" and batch == 1 and library == names[-1] and (kind, dense) in GOALS:
                        ratio["goal"] = GOALS[kind, dense]
                    if device == "cuda" and batch == GPU_BATCH and dense == "causal":
                        ratio["goal"] = GPU_GOAL
                    ratios.append(ratio)
            if (flexible := f"{kind}, flex_attention") in seconds_of:
                ours = f"{kind}, dalle, {names[0]}"
                ratios.append(
                    {"batch": batch, "ours": ours, "peer": flexible, "ratio": seconds_of[flexible] / seconds_of[ours]}
                )
    return {"sizes": asdict(sizes), "rows": rows, "ratios": ratios}


def _contenders(sizes: Sizes, batch: int, device: str, names: tuple[str, ...]) -> dict[str, Contender]:
    length = sizes.text_length + sizes.grid**2
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (batch, length, sizes.heads, sizes.d_head)
    joint = torch.randn(batch, length, 3, *shape[2:], device=device, dtype=dtype, requires_grad=True)
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in joint.unbind(2))
    gradient = torch.randn(shape, device=device, dtype=dtype)

    def ours(kind: AttentionKind) -> Callable[[], object]:
        def work() -> object:
            out = attend(kind, joint, sizes.text_length, sizes.grid, sizes.conv_kernel)
            return torch.autograd.grad(out, joint, gradient)

        return work

    def by_flex(kind: AttentionKind) -> Callable[[], object]:
        attention = FlexAttention(kind, sizes.text_length, sizes.grid, sizes.conv_kernel, torch.device(device))
        return lambda: torch.autograd.grad(attention(joint), joint, gradient)

    def dense(kind: AttentionKind | None) -> Callable[[], object]:
        mask = None if kind is None else mask_of(kind, sizes.text_length, sizes.grid, sizes.conv_kernel).to(device)

        def work() -> object:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            return torch.autograd.grad(out, (q, k, v), gradient.transpose(1, 2))

        return work

    found: dict[str, Contender] = {}
    for library in names:
        fast = library == names[0]
        for kind in KINDS:
            found[f"{kind}, dalle, {library}"] = Contender(ours(kind), fast)
            found[f"{kind} mask, SDPA, {library}"] = Contender(dense(kind), fast)
        found[f"causal, SDPA, {library}"] = Contender(dense(None), fast)
    if device == "cuda":  # flex_attention has no backward pass on a CPU
        found |= {f"{kind}, flex_attention": Contender(by_flex(kind)) for kind in KINDS}
    return found
