"""The best checkpoint of a run: it is kept, later stages use it, and a run that only gets worse says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Call
from helpers.running import smallest_recipe, write_recipe

from dalle_cli.config.schema import PriorSettings
from dalle_cli.distributed.engine import Replicated
from dalle_cli.prior.model import load_prior
from dalle_cli.stores.checkpoint import open_checkpoint, steps_in
from dalle_cli.stores.held_out import split_store
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.state import TrainingState
from dalle_cli.training.validation import BestValidation
from dalle_cli.views.describe_run import describe_run

ROWS, GRID, CODES, TEXT = 60, 4, 16, 48


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of random captions and images, in which there is nothing to learn but to memorise."""
    path, rng = tmp_path_factory.mktemp("noise") / "tokens.zarr", np.random.default_rng(0)
    keys = [f"{row:03d}" for row in range(ROWS)]
    text = rng.integers(400, size=(ROWS, TEXT)).astype(np.uint16)
    image = rng.integers(CODES, size=(ROWS, GRID, GRID)).astype(np.uint16)
    identity = {"source": "s", "source_name": "s", "tokenizer": "t" * 64, "text_length": TEXT, "vocab_size": 400}
    with PartWriter(path, "text", identity, ROWS) as writer:
        lengths = np.full(ROWS, TEXT, np.uint16)
        writer.append(keys, {"text": text, "text_length": lengths, "caption": np.array(["x"] * ROWS, object)}, {})
        writer.finish()
    identity = {"source": "s", "source_name": "s", "dvae": "d" * 64, "grid": GRID, "codebook_size": CODES}
    with PartWriter(path, "image", identity, ROWS) as writer:
        writer.append(keys, {"image": image, "image_ok": np.ones(ROWS, np.uint8)}, {})
        writer.finish()
    return path


def memorising_recipe(folder: Path, **training: int) -> Path:
    """Write a recipe whose prior memorises ``noise`` within 120 updates, validated every 10."""
    recipe = smallest_recipe(folder / "run", None)
    recipe["prior"]["model"] |= {"heads": 4, "d_head": 16, "d_model": 64}
    recipe["prior"]["learning_rate"] = {"peak": 1e-2, "schedule": "constant"}
    recipe["prior"]["training"] = {
        "updates": 120, "batch_size": 16, "ema_decay": 0.5, "log_every": 60, "validate_every": 10, "save_every": 60,
        "keep": 1, **training,
    }  # fmt: skip
    return write_recipe(folder, recipe)


def losses(run: Path) -> dict[int, float]:
    """Return the held-out image loss of each validation in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["val_image"] for line in lines if "val_image" in line}


def test_the_best_checkpoint_is_kept_and_used(noise: Path, tmp_path: Path, call: Call) -> None:
    recipe, run = memorising_recipe(tmp_path), tmp_path / "run" / "prior"
    done = call("train-prior", recipe, "--tokens", noise)
    assert done.code == 0, done.err
    found = losses(run)
    best = min(found, key=lambda step: found[step])
    assert best < 120
    assert [folder.name for folder in steps_in(run)] == [f"step-{best:08d}", "step-00000120"]
    assert open_checkpoint(run).step == best
    assert open_checkpoint(run, which="last").step == 120
    assert open_checkpoint(run).metrics["image"] == pytest.approx(found[best])
    assert f"later stages use step-{best:08d}" in done.err
    assert f"the held-out image loss rose from {found[best]:.4g} after {best} updates to {found[120]:.4g}" in done.err
    assert "above" in done.err
    shown = json.loads(call("show", run, "--json").out)
    assert shown["step"] == best
    metrics = open_checkpoint(run, which="last").metrics
    assert len(shown["warnings"]) == 2 + (metrics["image"] >= metrics["image_other_captions"])


def test_a_run_ends_when_its_patience_is_exhausted(noise: Path, tmp_path: Path, call: Call) -> None:
    recipe, run = memorising_recipe(tmp_path, patience=3), tmp_path / "run" / "prior"
    assert "3 validations without a gain" in call("train-prior", recipe, "--tokens", noise).err
    found = losses(run)
    best = min(found, key=lambda step: found[step])
    assert max(found) == best + 30
    again = call("train-prior", recipe, "--tokens", noise)
    assert again.code == 0
    assert f"already trained; patience ended it at {best + 30} of " in again.err
    assert losses(run) == found
    described = describe_run(tmp_path / "run")
    assert described is not None
    states = {stage.command: (stage.state, stage.detail) for stage in described.stages}
    assert states["train-prior"][0] == "done"
    assert states["train-prior"][1].startswith(f"update {best + 30} of ")
    assert states["train-prior"][1].endswith(", ended by patience")


def test_a_killed_run_finds_the_same_best_checkpoint(noise: Path, tmp_path: Path, call: Call) -> None:
    """A run that stops after 70 updates and resumes ends like one that was left alone."""
    whole = memorising_recipe(tmp_path / "whole")
    assert call("train-prior", whole, "--tokens", noise).code == 0
    parts = memorising_recipe(tmp_path / "parts")
    assert call("train-prior", parts, "--tokens", noise, "--set", "prior.training.updates=70").code == 0
    assert call("train-prior", parts, "--tokens", noise).code == 0
    runs = [tmp_path / name / "run" / "prior" for name in ("whole", "parts")]
    assert losses(runs[0]) == losses(runs[1])
    assert open_checkpoint(runs[0]).identity == open_checkpoint(runs[1]).identity


def test_the_unigram_loss_by_hand(noise: Path, tmp_path: Path, call: Call) -> None:
    recipe = memorising_recipe(tmp_path, updates=10)
    assert call("train-prior", recipe, "--tokens", noise).code == 0
    found = open_checkpoint(tmp_path / "run" / "prior")
    reader = TokenReader(noise)
    training, held_out = split_store(reader, found.recipe())
    counts = np.bincount(reader.read("image", training).ravel(), minlength=CODES) + 1
    expected = -np.log((counts / counts.sum())[reader.read("image", held_out).ravel()]).mean()
    assert found.metrics["image_unigram"] == pytest.approx(expected)


def test_only_comparable_validations_count() -> None:
    best = BestValidation()
    assert not best.exhausts(1)
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5), (40, math.inf)):
        best.observe(step, loss)
    assert (best.step, best.loss, best.validations_since) == (20, 1.0, 2)
    assert best.exhausts(2)
    assert not best.exhausts(3)
    assert not best.exhausts(None)


def test_the_loss_under_other_captions_by_hand(noise: Path, tmp_path: Path, call: Call) -> None:
    assert call("train-prior", memorising_recipe(tmp_path, updates=30), "--tokens", noise).code == 0
    found = open_checkpoint(tmp_path / "run" / "prior", which="last")
    prior, reader = load_prior(found), TokenReader(noise)
    _, held_out = split_store(reader, found.recipe())
    half = len(held_out) // 2
    others = np.concatenate([held_out[-half:], held_out[:-half]])
    text, length = (torch.from_numpy(reader.read(name, others).astype(np.int64)) for name in ("text", "text_length"))
    image = torch.from_numpy(reader.read("image", held_out).astype(np.int64)).flatten(1)
    with torch.no_grad():
        loss = prior.loss(text, length, image).image
    assert found.metrics["image_other_captions"] == pytest.approx(float(loss), rel=1e-4)
    assert found.metrics["image_other_captions"] != found.metrics["image"]


def test_a_run_of_an_earlier_version_goes_on_by_the_whole_loss_and_in_its_order() -> None:
    """Such a trainer state names neither the loss that the best checkpoint was found by, nor the order of rows."""
    saved = {"plateau": {}, "best": {"step": 40, "loss": 1.5, "validations_since": 2}}
    state = TrainingState(Replicated(torch.nn.Linear(1, 1)), PriorSettings(), set())
    state.best.by = "image"
    state.load_schedules(SimpleNamespace(trainer_state=lambda: saved, path=Path("run")))  # type: ignore[arg-type]
    assert state.best == BestValidation(40, 1.5, 2, by="loss")
    assert state.order == "consecutive windows"
