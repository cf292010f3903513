"""The description of the machine that a result was measured on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe_machine(device: str) -> dict[str, str | int]:
    """Return the processor, versions, date and command of this run."""
    found: dict[str, str | int] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["scripts/bench/prior", *sys.argv[1:]]),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    with suppress(PackageNotFoundError):
        found["dalle-pytorch"] = version("dalle-pytorch")
    return found


def _processor() -> str:
    """The processor's name as Linux gives it, or what Python knows."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()
