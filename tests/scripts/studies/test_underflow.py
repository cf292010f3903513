"""scripts/studies/underflow.py at sizes that take seconds."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.token_stores import write_tokens
from underflow_probe import VARIANTS, Study, probe, stretch, synthetic_tokens

SCRIPT = Path(__file__).parents[3] / "scripts" / "studies" / "underflow.py"
TINY = Study(layers=3, heads=2, d_head=8, grid=4, text_length=4, text_vocab=16, image_vocab=16, batch_size=2)


def by_variant(rows: list[dict[str, float]], key: str) -> dict[str, list[float]]:
    return {name: [row[key] for row in rows if row["variant"] == name] for name in VARIANTS}


def test_plain_float16_loses_the_gradients_of_a_thousand_replicas() -> None:
    rows = probe(TINY, TINY.prior().state_dict(), synthetic_tokens(TINY, 0))
    assert len(rows) == 6 * len(VARIANTS)
    errors, scales = by_variant(rows, "matrix_error"), by_variant(rows, "log2_scale")
    assert max(errors["fp32"]) == 0
    assert min(errors["plain fp16"]) > 0.02
    assert max(errors["one scale"] + errors["scale per resblock"]) < 2e-3
    assert len(set(scales["one scale"])) == 1
    assert min(scales["scale per resblock"]) >= scales["one scale"][0] > 10 + 7


def test_gradients_25_octaves_apart_need_a_scale_per_resblock() -> None:
    """A scale per resblock keeps gradients above float16's subnormals; one common scale does not."""
    prior, tokens = TINY.prior(), synthetic_tokens(TINY, 0)
    stretch(prior, 2.0**5, tokens)
    rows = probe(TINY, prior.state_dict(), tokens)
    medians = by_variant(rows, "entering_log2_p50")["fp32"]
    assert medians[0] - medians[-1] > 20
    lost, subnormal, errors = (by_variant(rows, key) for key in ("lost", "subnormal", "matrix_error"))
    assert lost["plain fp16"] == errors["plain fp16"] == [1.0] * 6
    assert subnormal["one scale"][-1] > 0.5
    assert subnormal["all fp16, one scale"][-1] > 0.5
    assert max(lost["scale per resblock"] + subnormal["scale per resblock"]) < 0.01
    assert max(errors["scale per resblock"]) < 5e-3


def test_a_stretched_stream_grows_by_the_given_factor() -> None:
    prior, tokens = TINY.prior(), synthetic_tokens(TINY, 0)
    stretch(prior, 3.0, tokens)
    sizes: list[float] = []
    for block in prior.resblocks:
        block.register_forward_hook(lambda _, __, output: sizes.append(output.square().mean().sqrt().item()))
    prior.loss(*tokens)
    assert sizes[-1] == pytest.approx(1024, rel=0.5)
    growth = [math.log2(b / a) for a, b in pairwise(sizes)]
    assert sum(growth) / len(growth) == pytest.approx(math.log2(3), rel=0.2)


def test_the_script_writes_tables_and_a_plot(tmp_path: Path) -> None:
    """The study takes its sizes from a token store."""
    store = write_tokens(tmp_path / "tokens.zarr", 20, text_length=3, vocab_size=30, grid=2, codebook_size=8)
    sizes = {"layers": 1, "heads": 1, "d-head": 8, "batch-size": 2, "updates": 3, "threads": 1, "tokens": store}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "out", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(done.stdout.count(name) >= 3 for name in VARIANTS)
    with (tmp_path / "out" / "training.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["variant"], line["update"]) for line in lines] == [(n, str(u)) for n in VARIANTS for u in (1, 2, 3)]
    expected = math.log(31) / 8 + math.log(8) * 7 / 8
    assert all(abs(float(line["loss"]) - expected) < 0.1 for line in lines)
    with (tmp_path / "out" / "blocks.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * len(VARIANTS)
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert (study["updates"], study["text_vocab"], study["image_vocab"], study["grid"]) == (3, 30, 8, 2)
    assert (tmp_path / "out" / "underflow.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_store_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--tokens", tmp_path / "none.zarr"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "none.zarr" in done.stderr
    assert "Traceback" not in done.stderr
