"""scripts/gpu-check with the CPU in the place of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.running import ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu-check"


def check(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, *words]
    environment = {**os.environ, **ENVIRONMENT, "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_results_agree_and_are_written(tmp_path: Path) -> None:
    done = check("agreement", "stack", "--device", "cpu", "--tiny", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu-none.json").read_text())["parts"]
    assert {part["ended"] for part in parts.values()} == {""}
    assert len(parts["agreement"]["rows"]) == 15
    assert all(row["met"] in ("yes", "") for row in parts["agreement"]["rows"])
    assert [row["what"] for row in parts["stack"]["rows"]] == ["12b, a layer of one sample, time"]
    assert (tmp_path / "gpu-none.md").read_text() in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check("--out", tmp_path)
    assert done.returncode == 2
    assert "finds no GPU" in done.stderr
    assert not list(tmp_path.iterdir())
