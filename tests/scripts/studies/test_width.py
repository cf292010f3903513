"""scripts/studies/width.py at sizes that take seconds: it prints what the runs recorded, and it resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.running import ENVIRONMENT, smallest_recipe, write_recipe
from helpers.token_stores import write_tokens

SCRIPT = Path(__file__).parents[3] / "scripts" / "studies" / "width.py"


@pytest.mark.slow
def test_a_study_prints_what_the_runs_recorded_and_resumes(tmp_path: Path) -> None:
    settings = smallest_recipe(tmp_path / "run", None)
    settings["tokenizer"] = {"vocab_size": 256, "text_length": 3}
    recipe = write_recipe(tmp_path, settings)
    store = write_tokens(tmp_path / "tokens.zarr", 60, text_length=3, vocab_size=30, grid=4, codebook_size=16)
    command = [sys.executable, SCRIPT, "--tokens", store, "--recipe", recipe, "--out", tmp_path / "out"]
    command += ["--widths", "8,16", "--rates", "1e-3,4e-3", "--petaflops", "1e-8"]

    def study(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command), *more], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)

    done = study()
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert [(row["width"], row["rate"]) for row in rows] == [(8, 1e-3), (8, 4e-3), (16, 1e-3), (16, 4e-3)]
    assert rows[0]["updates"] > rows[2]["updates"] >= 4
    for row in rows:
        run = tmp_path / "out" / f"width-{row['width']}-rate-{row['rate']:g}"
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == row["updates"]
        assert last["val_raw_text"] == row["raw_text"] != row["text"]
        assert abs(row["loss"] - row["text"] / 8 - row["image"] * 7 / 8) < 1e-6
        assert f"{row['image']:.4f}" in done.stdout
    assert done.stdout.count("best of its width") == 2
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
    again = study()
    assert again.stdout == done.stdout
    assert again.stderr.count("already trained") == 4

    refused = study("--widths", "9")
    assert refused.returncode == 2
    assert "--widths 9: is no multiple" in refused.stderr
