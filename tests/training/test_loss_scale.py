"""Training under float16 autocast with one loss scale: the arithmetic of an update, and a whole dVAE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Call
from helpers.killed_runs import files
from helpers.running import Chain
from torch import Tensor, nn

from dalle_cli.config.schema import Adam
from dalle_cli.distributed.engine import Replicated
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.training.updates import AdamUpdates

SETTINGS = Adam(clip_norm=0.5)


def updates_of(scaler: torch.amp.GradScaler | None) -> AdamUpdates:
    torch.manual_seed(0)
    engine = Replicated(nn.Linear(5, 3), loss_scaler=scaler)
    return AdamUpdates(engine, {"weight"}, SETTINGS)


def step(updates: AdamUpdates, loss: Tensor) -> dict[str, float]:
    updates.zero_grad()
    updates.engine.backward(loss)
    return {name: float(value) for name, value in updates.step(1e-2).items()}


def loss_of(updates: AdamUpdates, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    found: Tensor = updates.engine.model(torch.randn(7, 5, generator=generator)).square().sum()
    return found


def test_a_scaled_loss_makes_the_updates_of_the_plain_one() -> None:
    plain, scaled = updates_of(None), updates_of(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    for number in range(4):
        norms = [step(each, loss_of(each, number))["grad_norm"] for each in (plain, scaled)]
        assert norms[0] == norms[1] > 0.5  # so that the norm is clipped
    for name in plain.engine.names:
        assert torch.equal(plain.engine.read(name), scaled.engine.read(name))


def test_a_gradient_that_is_not_finite_skips_the_update_and_halves_the_scale() -> None:
    updates = updates_of(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    step(updates, loss_of(updates, 0))
    before = {name: updates.engine.read(name).clone() for name in updates.engine.names}
    moments = {name: {key: value.clone() for key, value in updates.moments(name).items()} for name in before}
    logged = step(updates, loss_of(updates, 1) * torch.inf)
    assert logged == {"grad_norm": 0, "skipped": 1, "log2_scale": 12, "skipped_updates": 1}
    assert all(torch.equal(updates.engine.read(name), value) for name, value in before.items())
    for name, saved in moments.items():
        assert all(torch.equal(updates.moments(name)[key], value) for key, value in saved.items())
    logged = step(updates, loss_of(updates, 1))
    assert (logged["skipped"], logged["log2_scale"], logged["skipped_updates"]) == (0, 11, 1)
    assert not torch.equal(updates.engine.read("weight"), before["weight"])

    while logged["log2_scale"] > -24:
        logged = step(updates, loss_of(updates, 1) * torch.inf)
    with pytest.raises(UserError, match="not finite in float16 however the loss is scaled"):
        step(updates, loss_of(updates, 1) * torch.inf)


def test_the_scale_is_resumed() -> None:
    updates = updates_of(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    step(updates, loss_of(updates, 1) * torch.inf)
    again = updates_of(torch.amp.GradScaler("cpu"))
    again.load_trainer_state(json.loads(json.dumps(updates.trainer_state())))
    assert again.trainer_state() == updates.trainer_state()


def test_a_dvae_trains_in_float16_and_resumes(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    def train(out: Path, precision: str) -> dict[str, float]:
        settings = {"precision": precision, "training.updates": 8, "training.save_every": 4}
        changes = [part for key, value in settings.items() for part in ("--set", f"dvae.{key}={value}")]
        done = call("train-dvae", by_hand.recipe, "--data", by_hand.train, *changes, "--out", out)
        assert done.code == 0, done.err
        return dict(open_checkpoint(out, "dvae", "last").metrics)

    whole, half = train(tmp_path / "fp32", "fp32"), train(tmp_path / "fp16", "fp16")
    assert half["loss"] != whole["loss"]
    assert abs(half["loss"] - whole["loss"]) < 0.01 * abs(whole["loss"])
    last = tmp_path / "fp16" / "step-00000008"
    state = json.loads((last / "trainer" / "state.json").read_text())
    assert state["loss_scale"]["scale"] >= 1
    undisturbed = files(last)
    shutil.rmtree(last)
    train(tmp_path / "fp16", "fp16")
    assert files(last) == undisturbed
