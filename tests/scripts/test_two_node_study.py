"""The study of two machines, at a size of seconds, on the loopback interface and over a link."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.running import ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "scripts" / "two-node-study"
SIZES = {"layers": 2, "heads": 2, "d-head": 8, "scenes": 50, "batch-size": 4, "updates": 3, "ranks": 4}
TINY = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


def study(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script's run."""
    command = [sys.executable, str(SCRIPT), *TINY, *arguments, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.mark.slow
def test_the_script_prints_a_table_and_writes_what_it_found(tmp_path: Path) -> None:
    done = study(tmp_path, "--mbit", "0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "two machines of 2 processes, loopback interface, 3 updates"
    assert [line[:12].strip() for line in lines[2:]] == ["whole", "full rank", "rank 4"]
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
    whole, full, low = json.loads((tmp_path / "study.json").read_text())["outcomes"]
    assert full["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert low["bytes"] < whole["bytes"] < full["bytes"]
    assert whole["link_bytes"] is None


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="namespaces take root and iproute2")
def test_over_a_link_the_kernel_counts_the_bytes(tmp_path: Path) -> None:
    done = study(tmp_path, "--mbit", "20")
    assert done.returncode == 0, done.stderr
    if "no network namespaces here" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    assert done.stdout.startswith("two machines of 2 processes, link of 20 Mbit/s")
    whole, _, low = json.loads((tmp_path / "study.json").read_text())["outcomes"]
    # Both processes of a machine send through it, and packets' heads and the loss's own messages come on top.
    for outcome in (whole, low):
        assert 2 * outcome["bytes"] < outcome["link_bytes"] < 1.5 * 2 * outcome["bytes"] + 20_000
    assert low["link_bytes"] < whole["link_bytes"]
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "dalle-" not in spaces


@pytest.mark.slow
def test_where_namespaces_cannot_be_it_says_so(tmp_path: Path) -> None:
    """With commands that refuse, as an ordinary user's do."""
    for name in ("ip", "tc"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
        tool.chmod(0o755)
    command = [sys.executable, str(SCRIPT), *TINY, "--out", str(tmp_path / "out")]
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    wanted = "no network namespaces here (Operation not permitted); the loopback interface takes their place"
    assert wanted in done.stderr
    assert "loopback interface" in done.stdout.splitlines()[0]
