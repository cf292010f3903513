"""scripts/studies/two_nodes.py at a size that takes seconds, on the loopback interface and over a link."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.running import ENVIRONMENT, smallest_recipe, write_recipe
from helpers.token_stores import write_tokens

SCRIPT = Path(__file__).parents[3] / "scripts" / "studies" / "two_nodes.py"


def study(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the study on a small store and write its results into ``folder/out``."""
    recipe = smallest_recipe(folder / "unused", None)
    store = write_tokens(folder / "tokens.zarr", 40, text_length=48, vocab_size=400, grid=4, codebook_size=16)
    command = [
        *(sys.executable, str(SCRIPT), "--recipe", str(write_recipe(folder, recipe)), "--tokens", str(store)),
        *("--out", str(folder / "out"), "--updates", "3", "--batch-size", "4", "--ranks", "2", *arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**ENVIRONMENT, **environment})


@pytest.mark.slow
def test_the_script_prints_a_table_and_writes_its_results(tmp_path: Path) -> None:
    done = study(tmp_path, "--mbit", "0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "two nodes of 2 processes, loopback interface, 3 updates"
    assert [line[:12].strip() for line in lines[2:]] == ["whole", "rank 2"]
    whole, low = json.loads((tmp_path / "out" / "study.json").read_text())["outcomes"]
    assert low["bytes_between_nodes"] < whole["bytes_between_nodes"]
    assert low["validation_loss"] != whole["validation_loss"]
    assert whole["link_bytes"] is None


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="namespaces need root and iproute2")
def test_over_a_link_the_kernel_counts_the_bytes(tmp_path: Path) -> None:
    done = study(tmp_path, "--mbit", "20")
    assert done.returncode == 0, done.stderr
    if "no network namespaces here" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    assert done.stdout.startswith("two nodes of 2 processes, link of 20 Mbit/s")
    whole, low = json.loads((tmp_path / "out" / "study.json").read_text())["outcomes"]
    # Both processes of a node send over the link, together with packet headers and the run's other collectives.
    for outcome in (whole, low):
        assert 2 * outcome["bytes_between_nodes"] < outcome["link_bytes"]
    assert low["link_bytes"] < whole["link_bytes"]
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "dalle-" not in spaces


@pytest.mark.slow
def test_without_namespaces_it_says_so_and_uses_the_loopback(tmp_path: Path) -> None:
    """The commands fail here as they do for a user without root."""
    for name in ("ip", "tc"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
        tool.chmod(0o755)
    done = study(tmp_path, PATH=f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "no network namespaces here (Operation not permitted); using the loopback interface instead" in done.stderr
    assert "loopback interface" in done.stdout.splitlines()[0]
