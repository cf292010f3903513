"""The benchmark scripts run and report what they measured; the speeds themselves are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Call
from helpers.running import ENVIRONMENT, Chain, smallest_recipe, write_recipe

SCRIPTS = Path(__file__).parents[3] / "scripts" / "bench"


def bench(name: str, *arguments: object) -> dict[str, float]:
    """Run a benchmark script and return the JSON object it prints."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments), "--json"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_bench_encode(tmp_path: Path, call: Call) -> None:
    assert call("make-shapes", tmp_path / "shapes", "--n", 30, "--test-n", 1, "--size", 32).code == 0
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", None))
    found = bench("encode", recipe, "--data", tmp_path / "shapes" / "train", "--rounds", 2, "--seconds", 0.05)
    assert found["pictures"] >= 128
    assert found["image_size"] == 32
    assert found["n_hid"] == 8
    for kind in ("encoder", "pipeline"):
        assert found[f"{kind}_pictures_per_second"] > 0
        assert found[f"{kind}_pictures_per_cpu_second"] > 0
    ratio = found["pipeline_pictures_per_second"] / found["encoder_pictures_per_second"]
    assert found["ratio"] == pytest.approx(ratio, rel=0.01)


def test_bench_store(tmp_path: Path) -> None:
    arguments = ("--rows", 9000, "--batch", 100, "--rounds", 1, "--dir", tmp_path / "made")
    found = bench("store", *arguments)
    assert found["rows"] == 9000
    assert found["memmap_bytes"] == 9000 * 2 * (256 + 1024)
    assert found["store_bytes"] < found["memmap_bytes"]
    assert found["epoch_decoded_bytes"] == found["memmap_bytes"]
    assert all(found[f"{kind}_store_rows_per_second"] > 0 for kind in ("epoch", "anywhere", "uncached"))
    assert bench("store", *arguments)["store_bytes"] == found["store_bytes"]  # the store is found, not made again


def test_bench_checksums() -> None:
    found = bench("checksums", "--rounds", 1, "--gb", 0.01)
    assert found["bytes_a_picture"] > 10_000
    for kind in ("read", "decode", "encode", "compress"):
        assert found[f"{kind}_microseconds"] > 0
    assert found["share_of_encode_images"] < found["share_without_the_encoder"] < 0.5


def test_bench_tokenize() -> None:
    found = bench("tokenize", "--captions", 600, "--rounds", 1)
    assert set(found["runs"]) == {"encode_batch", "tokenize-text", "reading", "with dropout"}  # type: ignore[arg-type]
    assert all(run["captions_per_second"] > 0 for run in found["runs"].values())  # type: ignore[attr-defined]


def test_bench_scale() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "scale", "--pairs", "300", "900", "--quick"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line][2:]
    assert [row[1] for row in rows] == ["300", "900"] * 6
    assert all(float(row[2]) > 0 for row in rows)
    copies = [row[-1] for row in rows if row[0].startswith("near-duplicates")]
    assert all(cell.startswith("copies found 1,") for cell in copies)


@pytest.mark.parametrize("stage", ["dvae bf16", "encode fp32", "prior fp32", "clip fp32"])
def test_bench_chain(by_hand: Chain, stage: str) -> None:
    """Stages are measured on the run of a chain; a product and an operator take part in each."""
    settings = ("--set", f"data.train={by_hand.train}", "--set", f"run={by_hand.tokens.parent}")
    done = subprocess.run(
        [sys.executable, SCRIPTS / "chain", by_hand.recipe, *settings, "--updates", "5", "--stage", stage],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["stage"] == stage
    assert min(found["ms"], found["gflop"], found["memory_mb"], *found["products"].values()) > 0
    assert len(found["operators"]) == 10
    assert 0.1 < sum(found["operators"].values()) <= 1
