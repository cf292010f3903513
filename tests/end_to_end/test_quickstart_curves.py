"""scripts/quickstart-curves on a tiny finished run: its page and figures, a second start, and refusals."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.running import DALLE, ENVIRONMENT
from helpers.tiny_chain import build_chain

from dalle_cli.data.open_source import open_source

SCRIPTS = Path(__file__).parents[2] / "scripts"
LIMIT, N = 2, 4
SYSTEMS = ["training pictures", "dVAE reconstructions", "samples"]
PLOTS = [
    "FID against blur, both sides blurred",
    "FID against the size of the reranking pool",
    "Captions drawn right against the size of the reranking pool",
]


def curves(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script as in a checkout at ``root``. Without a .venv there, it finds the ``dalle`` under test."""
    root.mkdir(exist_ok=True)
    if not (root / "scripts").exists():
        (root / "scripts").symlink_to(SCRIPTS)
    path = f"{Path(DALLE).parent}{os.pathsep}{ENVIRONMENT['PATH']}"
    return subprocess.run(
        [root / "scripts" / "quickstart-curves", *map(str, arguments)],
        env={**ENVIRONMENT, "PATH": path, "XDG_CACHE_HOME": str(root / "cache")},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def start(root: Path) -> subprocess.CompletedProcess[str]:
    done = curves(root, "--run", "run", "--limit", LIMIT, "--n", N)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The root of a checkout where the script has run, and its stderr."""
    root = tmp_path_factory.mktemp("curves")
    chain = build_chain(root)
    (root / "shapes").rename(chain.places.root / "shapes")
    return root, start(root).stderr


def test_the_page_has_three_systems_and_their_curves(finished: tuple[Path, str]) -> None:
    root, said = finished
    out = root / "run" / "curves"
    stages = [line.split()[2] for line in said.splitlines() if line.startswith("== dalle ")]
    assert stages == ["sample", "rerank", "reconstruct", "eval-fid"]
    assert said.rstrip().endswith("Look at run/curves/page/index.html")

    figures = json.loads((out / "figures.json").read_text())
    assert figures == json.loads((out / "page" / "figures.json").read_text())
    systems: dict[str, dict[str, Any]] = {system["name"]: system for system in figures["systems"]}
    assert list(systems) == SYSTEMS
    captions = {open_source(str(root / "run" / "shapes" / kind)).captions(row)[0] for kind in ("seen", "heldout")
                for row in range(LIMIT)}  # fmt: skip
    for system in systems.values():
        assert system["n_generated"] == system["n_reference"] == len(captions) == 2 * LIMIT
        assert [point["radius"] for point in system["blur"]] == [0, 1, 2, 4, 8]
        assert len({point["fid"] for point in system["blur"]}) == 5
        assert system["blur"][0]["fid"] == system["fid"]
    assert len({system["fid"] for system in systems.values()}) == 3
    samples = systems["samples"]
    assert [name for name in SYSTEMS if systems[name]["pool"]] == ["samples"]
    assert [name for name in SYSTEMS if systems[name]["accuracy"]] == ["samples"]
    assert [point["size"] for point in samples["pool"]] == [1, 2, 4]
    # A whole pool has only one subset, so the last point is the system's own FID.
    assert samples["pool"][-1]["fid"] == pytest.approx(samples["fid"])
    assert samples["pool"][0]["fid"] != samples["fid"]
    for group in ("seen pairs", "held-out pairs"):
        found = samples["accuracy"][group]
        assert (found["prompts"], found["samples"]) == (LIMIT, LIMIT * N)
        assert list(found["by_pool_size"]) == ["1", "2", "4"]
    with (out / "page" / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = {(row["system"], row["curve"], row["x"]): float(row["value"]) for row in rows if row["metric"] == "fid"}
    assert shown[("dVAE reconstructions", "blur", "8")] == systems["dVAE reconstructions"]["blur"][-1]["fid"]
    assert shown[("samples", "pool", "2")] == samples["pool"][1]["fid"]

    page = (out / "page" / "index.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in SYSTEMS)
    assert all(f'<img alt="{title}"' in page for title in PLOTS)
    assert all(f'<img alt="{whose}: {caption}"' in page for caption in captions for whose in ("samples", "real"))


def read_all(folder: Path) -> dict[str, bytes]:
    """Read all files except the list of commands, to which a second start appends."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "commands.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def written(root: Path) -> dict[str, tuple[int, int]]:
    """Return the modification time and inode of samples (without scores) and features, which are slow to make."""
    found = [*(root / "cache").rglob("*"), *(root / "run" / "curves" / f"samples-{LIMIT}-{N}").rglob("*")]
    kept = [file for file in found if file.is_file() and "clip_score" not in file.parts]
    return {str(file): (file.stat().st_mtime_ns, file.stat().st_ino) for file in kept}


@pytest.mark.slow
def test_a_second_start_samples_and_measures_nothing_anew(finished: tuple[Path, str]) -> None:
    root, said = finished
    contents, times = read_all(root / "run"), written(root)
    drawn = len([name for name in times if name.endswith(".png")])
    assert drawn == 2 * LIMIT * N
    assert any(name.endswith(".safetensors") for name in times)
    assert f"sample: {drawn}/{drawn} images" in said
    again = start(root)
    assert "sample: " not in again.stderr
    assert written(root) == times
    assert read_all(root / "run") == contents


def test_a_missing_run_and_unknown_options_are_refused(tmp_path: Path) -> None:
    for arguments, words in {
        (): "quickstart-curves: runs/quickstart has no CLIP yet; run scripts/quickstart first",
        ("--run", "run"): "quickstart-curves: run has no CLIP yet; run scripts/quickstart first",
        ("--size", 4): "quickstart-curves: unknown option --size; there are --limit, --n and --run",
    }.items():
        done = curves(tmp_path, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", words + "\n")
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]
