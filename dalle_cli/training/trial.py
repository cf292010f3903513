"""Trials: a faster way to compute a part of a model is taken only if it runs here and comes to the same values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dalle_cli.progress import log

TOLERANCE = 0.05
"""Tolerance of a trial, relative to the largest value: above the rounding of 16 bit, below the effect of an error."""

TINY = torch.finfo(torch.float32).tiny


def prepare_compiler() -> None:
    """Set torch.compile up for code that serves many blocks, and for the same result in every run.

    By default it gives up on code that it has compiled 8 times, splits what runs under DistributedDataParallel, and
    chooses kernels by timing them.
    """
    from torch._dynamo import config as compiling
    from torch._inductor import config as generating

    compiling.recompile_limit, compiling.optimize_ddp = 64, False
    if hasattr(generating, "deterministic"):  # which older versions lack
        generating.deterministic = True


def agrees(what: str, plain: Callable[[], Sequence[Tensor]], fast: Callable[[], Sequence[Tensor]]) -> bool:
    """Return whether ``fast`` returns what ``plain`` does, to the rounding of 16 bit; log why it is not used.

    ``what`` names the part of a model and the way to compute it, such as ``"row attention by flex_attention"``.
    """
    wanted = plain()
    try:
        pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(fast(), wanted, strict=True)]
        errors = [float((a - b).abs().max() / b.abs().max().clamp(min=TINY)) for a, b in pairs]
        if wrong := [error for error in errors if not error <= TOLERANCE]:  # NaN is wrong too
            raise RuntimeError(f"it is off by {wrong[0]:.2g} of the largest value")
    except Exception as error:  # a compiler, or what it generates, may fail in any way
        cause = getattr(error, "inner_exception", error)  # of torch.compile, which names its backend first
        reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
        log(f"{what}: not used here ({reason}); the plain way takes its place")
        return False
    return True
