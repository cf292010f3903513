"""The device that a model runs on, its threads, and what to say when its memory is full."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError


def choose_device(local_rank: int = 0) -> torch.device:
    """The GPU of this process, the ``local_rank``-th of its machine, where there is CUDA; else the CPU.

    Raises:
        UserError: the machine has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK {local_rank}: this machine shows {count} GPUs (numbered from 0); "
            f"start at most {count} processes here: torchrun --nproc-per-node {count}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # The fastest convolution is not always one that adds in the same order twice.
    torch.backends.cudnn.deterministic = True
    return device


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine as far as a container's limit lets processes have them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # not of this version of control groups, or "max"
            known.append(int(Path(file).read_text()))
    return min(known)


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed rather than give it back to the system at every operation.

    By default an activation of more than 32 MB is mapped anew each time, and the system then clears its pages one by
    one: half of the time of a forward pass of a dVAE on the CPU. Other allocators are left alone.
    """
    mmap_threshold, trim_threshold, mmap_max = -3, -1, -4  # M_MMAP_THRESHOLD and so on, of glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    if not mallopt(mmap_threshold, 2**30):  # older versions take at most 32 MB
        mallopt(mmap_max, 0)


def limit_threads(recipe: Recipe) -> None:
    """Let torch use the recipe's number of CPU threads, if it names one."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)


@contextmanager
def explain_out_of_memory(out: Path, mend: str) -> Iterator[None]:
    """Turn a full GPU into one line that ends with ``mend``, what to set in the recipe."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"{out}: {reason}; {mend}, and run again: nothing saved is lost") from error


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
