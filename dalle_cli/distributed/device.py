"""The device that a model runs on: choosing it, preparing the process for it, its memory and its CPU threads."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from dalle_cli.config.schema import Device, Recipe
from dalle_cli.errors import UserError
from dalle_cli.progress import log

DEVICE_VARIABLE = "DALLE_DEVICE"
"""Environment variable that names the device of commands without a recipe, and of recipes whose ``device`` is auto."""
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(wanted: Device = "auto", local_rank: int = 0) -> torch.device:
    """Return the device that the recipe's ``device`` names, or DEVICE_VARIABLE if that is auto.

    If both are auto, it is the GPU with number ``local_rank`` on this machine if CUDA is available, else Apple's GPU
    (``mps``) if there is one, else the CPU.

    Raises:
        UserError: the named device is not there, the machine has fewer GPUs than ranks, or Slurm gave this job GPUs
            that torch cannot use.
    """
    named = "device"
    if wanted == "auto":
        named, wanted = DEVICE_VARIABLE, _variable()
    if wanted == "cpu":
        return torch.device("cpu")
    with_cuda, with_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "mps" and not with_mps:
        raise UserError(f"{named}: torch {torch.__version__} finds no GPU of Apple's here; set it to auto")
    if wanted == "cuda" and not with_cuda:
        raise UserError(
            f"{named}: torch {torch.__version__} finds no GPU by CUDA on {platform.node()}; set it to auto, or install "
            "a torch for the driver's version of CUDA"
        )
    if wanted == "mps" or (wanted == "auto" and with_mps and not with_cuda):
        return torch.device("mps")
    if not with_cuda:
        if (given := os.environ.get("SLURM_GPUS_ON_NODE", "0")) != "0":
            raise UserError(
                f"SLURM_GPUS_ON_NODE {given}: Slurm gave this job GPUs, but torch {torch.__version__} finds none on "
                f"{platform.node()}; install a torch for CUDA, load the driver's module, or ask for no GPU"
            )
        if _NVIDIA_DRIVER.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
            _warn_of_driver()
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK {local_rank}: this machine has {count} GPUs (numbered from 0); "
            f"start at most {count} processes here: torchrun --nproc-per-node {count}"
        )
    return torch.device("cuda", local_rank)


@cache
def _warn_of_driver() -> None:
    """Say once that torch cannot use the GPU whose driver is there."""
    log(
        f"no GPU is used: this machine has an NVIDIA driver, and torch {torch.__version__} finds none; install a torch "
        "for the driver's version of CUDA (nvidia-smi names it), or a newer driver"
    )


def _variable() -> Device:
    value = os.environ.get(DEVICE_VARIABLE) or "auto"
    if value not in (known := get_args(Device)):
        raise UserError(f"{DEVICE_VARIABLE}: is {value!r}; set it to one of {', '.join(known)}, or unset it")
    return cast(Device, value)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_for_doubles(device: torch.device) -> torch.device:
    """Return the device on which to compute in 64 bit what ``device`` began: Apple's GPUs leave it to the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def require_precision(key: str, precision: str, device: torch.device) -> None:
    """Raise UserError if the recipe's ``key`` asks for a precision that the GPU lacks, or only imitates, slowly."""
    if precision == "int8" and device.type != "cpu":
        raise UserError(f"{key}: int8 is for CPUs; set bf16 or fp32, or {DEVICE_VARIABLE}=cpu")
    if precision in ("bf16", "fp16") and device.type == "mps":
        raise UserError(f"{key}: {precision} is not for Apple's GPUs yet; set fp32, or {DEVICE_VARIABLE}=cpu")
    if precision == "bf16" and lacks_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{key}: {name} cannot compute in bf16, which came with Ampere; set fp16 or fp32")


def lacks_bf16(device: torch.device) -> bool:
    """Return whether ``device`` is a GPU by CUDA that lacks bf16, or only imitates it, slowly."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def gpu_precision(device: torch.device, lacking: bool) -> tuple[Literal["fp32", "bf16"], str]:
    """Return the precision that auto takes on a GPU, and the reason; ``lacking``: one of the GPUs has no bf16."""
    if device.type != "cuda":
        return "fp32", f"{device.type} computes in 32 bit"
    return ("fp32", "a GPU lacks bf16") if lacking else ("bf16", "the GPU computes in bf16")


def prepare_process(device: torch.device) -> None:
    """Set this process up to compute on ``device``, fast on a CPU and reproducibly on a GPU.

    On a CPU, the allocator keeps freed memory. On a GPU, the device becomes the current one and cuDNN uses
    deterministic convolutions only: the fastest one may add in another order each time.
    """
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True


def keep_freed_memory() -> None:
    """Have glibc's malloc reuse freed memory instead of returning it to the system.

    By default, an activation of more than 32 MB is mapped anew each time, and the kernel then clears its pages one by
    one, which takes half of the time of a dVAE's forward pass on the CPU. Other allocators are left alone.
    """
    mmap_threshold, trim_threshold, mmap_max = -3, -1, -4  # M_MMAP_THRESHOLD and so on, of glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    if not mallopt(mmap_threshold, 2**30):  # older versions accept at most 32 MB
        mallopt(mmap_max, 0)


def use_settings(recipe: Recipe) -> None:
    """Let torch use the recipe's number of CPU threads, if it sets one, and TF32 on a GPU if the recipe allows it.

    See ``training.idle_cores`` for ``threads: idle``.
    """
    if isinstance(recipe.threads, int):
        torch.set_num_threads(recipe.threads)
    precision = "tf32" if recipe.tf32 else "ieee"
    for products in (torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn).conv):
        products.fp32_precision = precision


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of this machine as far as a container's limit allows."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # the file of another version of control groups, or "max"
            known.append(int(Path(file).read_text()))
    return min(known)


@contextmanager
def explain_out_of_memory(out: Path, mend: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into a UserError that ends with ``mend``, the setting to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"{out}: {reason}; {mend}, and run again: no checkpoint is lost") from error


@contextmanager
def fast_matmul() -> Iterator[str]:
    """Run 32-bit matrix products on the CPU by the faster of PyTorch's two libraries; yield the library's name.

    MKL does not use AVX-512 on AMD processors; oneDNN does, and is twice as fast there. PyTorch passes 32-bit products
    to oneDNN only if it may round their operands to bfloat16. oneDNN does so only on processors with AMX, so those keep
    MKL, and a trial product confirms that nothing is rounded.

    Many small ``scaled_dot_product_attention`` calls become slow inside this block.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if matmul_library() == "oneDNN":
        settings.fp32_precision = "bf16"
        if rounds_to_bfloat16():
            settings.fp32_precision = before
    try:
        yield "MKL" if settings.fp32_precision == before else "oneDNN"
    finally:
        settings.fp32_precision = before


def matmul_library() -> str:
    """Return the library that ``fast_matmul`` prefers on this processor: "MKL" or "oneDNN"."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_amd = str(known.get("cpu_name")).startswith("AMD")
    return "oneDNN" if is_amd and known["avx512_f"] and not known["amx_tile"] else "MKL"


def rounds_to_bfloat16() -> bool:
    """Return whether a 32-bit matrix product rounds its operands to bfloat16 under the current settings."""
    near_one = torch.full((256, 256), 1 + 2**-12)
    return bool((near_one @ near_one == 256).any())
