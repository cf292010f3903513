"""The allocator that a CPU run asks for: freed memory is used again rather than mapped and cleared anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from helpers.running import ENVIRONMENT

PROGRAM = """
import resource, sys, torch
from dalle_cli.distributed.device import choose_device, keep_freed_memory
torch.cuda.is_available = lambda: False
if sys.argv[1] == "kept":
    assert choose_device() == torch.device("cpu")
def work():
    x = torch.ones(12_000_000)  # 48 MB
    return float((x + 1).relu_()[7])
for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_large_tensors_are_not_mapped_anew() -> None:
    def fresh_bytes(how: str) -> int:
        """Memory that the system hands out for each round of two tensors of 48 MB."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert fresh_bytes("kept") < 5_000_000 < 90_000_000 < fresh_bytes("default")
