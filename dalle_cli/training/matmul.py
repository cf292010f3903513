"""Which library multiplies 32-bit matrices on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def fast_matmul() -> Iterator[str]:
    """Inside the block, 32-bit matrix products on a CPU run on the faster of PyTorch's two libraries; gives its name.

    MKL leaves AVX-512 unused on processors of AMD; oneDNN uses it, and is twice as fast there. PyTorch sends it 32-bit
    products only with the permission to round their operands to bfloat16. It has such kernels for AMX alone, so
    processors with AMX are left out, and a product is made to show that nothing is rounded.

    Not for code with many small ``scaled_dot_product_attention``: their inner products become slow.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if _is_amd_with_avx512():
        settings.fp32_precision = "bf16"
        if _rounds_to_bfloat16():
            settings.fp32_precision = before
    try:
        yield "MKL" if settings.fp32_precision == before else "oneDNN"
    finally:
        settings.fp32_precision = before


def _is_amd_with_avx512() -> bool:
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return str(known.get("cpu_name")).startswith("AMD") and bool(known["avx512_f"]) and not known["amx_tile"]


def _rounds_to_bfloat16() -> bool:
    near_one = torch.full((256, 256), 1 + 2**-12)
    return bool((near_one @ near_one == 256).any())
