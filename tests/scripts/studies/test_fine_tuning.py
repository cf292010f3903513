"""scripts/studies/fine_tuning.py at sizes that take seconds: it prints what the journals recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.pictures import noise, write_sample
from helpers.running import ENVIRONMENT, smallest_recipe, write_recipe

from dalle_cli.stores.checkpoint import open_checkpoint

SCRIPT = Path(__file__).parents[3] / "scripts" / "studies" / "fine_tuning.py"


@pytest.mark.slow
def test_a_study_prints_what_the_journals_recorded(tmp_path: Path) -> None:
    settings = smallest_recipe(tmp_path / "unused", None)
    # A number is a weight without a schedule.
    settings["dvae"]["objective"] = {"kl_weight": 0.3, "temperature": {"start": 1.0, "end": 0.5, "updates": 4}}
    recipe, out = write_recipe(tmp_path, settings), tmp_path / "out"
    sources = [tmp_path / "earlier-pictures", tmp_path / "later-pictures"]
    for first, folder in zip((0, 100), sources, strict=True):
        for i in range(first, first + 40):
            write_sample(folder, f"{i:03d}", noise(40, 40, i), f"a picture of the number {i % 9}")
    command = [sys.executable, SCRIPT, *sources, "--recipe", recipe, "--out", out]
    command += ["--dvae-updates", "4", "--prior-updates", "4", "--tuned-updates", "2"]
    done = subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "study.json").read_text())
    runs = {"dvae": (out / "dvae-from-nothing", out / "tuned" / "dvae"),
            "prior": (out / "prior-from-nothing", out / "tuned" / "prior")}  # fmt: skip
    compared = {"dVAE": ("dvae", "val_loss"), "prior": ("prior", "val_loss"),
                "prior, images alone": ("prior", "val_image")}  # fmt: skip
    for row, (shown, (stage, name)) in zip(found["rows"], compared.items(), strict=True):
        nothing, tuned = runs[stage]
        losses = [json.loads(line) for line in (nothing / "metrics.jsonl").read_text().splitlines()]
        own = [line[name] for line in losses if name in line]
        assert found["curves"][shown]["nothing"]["losses"] == own
        assert len(own) == 4
        assert row["best"] == min(own)
        assert f"| {shown} | 4 | {row['best']:.4f} |" in done.stdout
        earlier = open_checkpoint(out / "earlier" / stage, stage)  # type: ignore[arg-type]
        assert open_checkpoint(tuned, stage).belongs["init"] == earlier.identity  # type: ignore[arg-type]
        assert "init" not in open_checkpoint(nothing, stage).belongs  # type: ignore[arg-type]
    assert (
        open_checkpoint(runs["prior"][0], "prior").belongs["dvae"] == open_checkpoint(runs["dvae"][1], "dvae").identity
    )
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
