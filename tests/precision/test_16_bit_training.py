"""train-prior in 16 bit: the loop, its checkpoints and resuming from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.running import smallest_recipe, write_recipe
from helpers.token_stores import write_tokens

from dalle_cli.config.load import load_recipe
from dalle_cli.errors import UserError
from dalle_cli.prior.model import load_prior
from dalle_cli.prior.train import train_prior
from dalle_cli.stores.checkpoint import Checkpoint

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.zarr", 80, 48, 400, 4, 16)


def trained(folder: Path, store: Path, name: str, precision: str, updates: int = 30, **training: Any) -> Checkpoint:
    settings = smallest_recipe(folder, None)
    prior = settings["prior"]
    prior["precision"] = precision
    prior["learning_rate"] = {"peak": 3e-3, "warmup_updates": 5, "schedule": "plateau"}
    prior["training"] = {**prior["training"], "updates": updates, "save_every": 10, "log_every": 5, **training}
    return train_prior(load_recipe(write_recipe(folder, settings, f"{name}.yaml")), store, folder / name)


def journal(checkpoint: Checkpoint) -> list[dict[str, float]]:
    lines = map(json.loads, (checkpoint.path.parent / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bit_trains_as_32_does(precision: str, store: Path, tmp_path: Path) -> None:
    exact = trained(tmp_path, store, "exact", "fp32")
    found = trained(tmp_path, store, "found", precision)
    losses, expected = ([line["loss"] for line in journal(run)] for run in (found, exact))
    assert expected[0] - expected[-1] > 0.3
    assert losses == pytest.approx(expected, abs=2e-2)

    last = journal(found)[-1]
    assert last["skipped"] == 0
    assert last["grad_norm"] == pytest.approx(journal(exact)[-1]["grad_norm"], rel=0.1)
    assert ("log2_scale_min" in last) == (precision == "fp16")

    raw, ema = found.tensors("raw"), found.tensors("ema")
    moments, state = found.trainer()
    matrices = set(load_prior(found).decayed_parameters())
    assert 0 < len(matrices) < len(raw)
    for name in raw:
        assert raw[name].dtype == (DTYPES[precision] if name in matrices else torch.float32)
        assert ema[name].dtype == torch.float32
        assert moments[f"exp_avg.{name}"].dtype == (torch.uint16 if name in matrices else torch.float32)
    assert len(state["scales"]["exponents"]) == (6 if precision == "fp16" else 0)
    # Sampling loads the 32-bit EMA weights.
    assert all(p.dtype == torch.float32 for p in load_prior(found).parameters())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_resumes_with_the_same_bytes(precision: str, store: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path, store, "whole", precision, updates=20)
    trained(tmp_path, store, "parts", precision, updates=7)
    parts = trained(tmp_path, store, "parts", precision, updates=20)
    assert parts.files == whole.files
    for name in ("optimizer.safetensors", "state.json"):
        assert (parts.path / "trainer" / name).read_bytes() == (whole.path / "trainer" / name).read_bytes()


def test_accumulation_and_checkpointing_change_little(store: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path, store, "whole", "fp16", updates=10)
    parts = trained(tmp_path, store, "parts", "fp16", updates=10, micro_batch=1)
    assert [line["loss"] for line in journal(parts)] == pytest.approx(
        [line["loss"] for line in journal(whole)], abs=1e-2
    )


def test_another_precision_is_another_run(store: Path, tmp_path: Path) -> None:
    trained(tmp_path, store, "run", "fp16", updates=3)
    with pytest.raises(UserError, match=r"prior\.precision = 'fp16', the recipe now says 'fp32'"):
        trained(tmp_path, store, "run", "fp32", updates=6)
