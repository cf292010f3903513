"""Four processes that share gradients as two machines of two would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from helpers import two_nodes
from helpers.running import ENVIRONMENT


def four_processes(scenario: str, folder: Path, timeout: float = 600) -> list[dict[str, Any]]:
    """What each of the four found."""
    command = [sys.executable, two_nodes.__file__, scenario, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(two_nodes.PROCESSES)]
