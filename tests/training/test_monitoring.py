"""What the journal says of a run's pace, cost and health, against figures worked out apart from it."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.running import DALLE, ENVIRONMENT, smallest_recipe, write_recipe
from helpers.token_stores import write_tokens
from torch import Tensor, nn

from dalle_cli.clip.train import ClipTask, build_recipe_clip
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.dvae.model import DVAE, Conv2d
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.precision.gradient_scaling import HIGHEST
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask, set_precision, train_prior
from dalle_cli.stores.checkpoint import open_checkpoint, save_checkpoint
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.state import TrainingState
from dalle_cli.training.throughput import PACE, Pace, SampleWork, peak_tflops

TEXT, VOCAB, GRID, CODES = 48, 400, 4, 16
FAKE_WANDB = """
import json, os
from pathlib import Path

class Run:
    def __init__(self, file):
        self.file = file
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        self.step = max((line["step"] for line in lines), default=-1) + 1
        self.first = self.step

    def log(self, values, step):
        assert step >= self.first, "sent again"
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\\n")

    def finish(self):
        self.file.with_suffix(".finished").touch()

def Image(array):
    return [*array.shape, str(array.dtype)]

def init(**told):
    folder = Path(os.environ["FAKE_WANDB"])
    if (folder / "broken").exists():
        raise RuntimeError("api_key not configured (no-tty)\\nmore")
    with (folder / "init.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\\n")
    return Run(folder / f"{told['id']}.jsonl")
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.zarr", 80, TEXT, VOCAB, GRID, CODES)


def recipe_of(folder: Path, peak: float = 0.5, **training: Any) -> Path:
    settings = smallest_recipe(folder, None)
    settings["prior"]["training"] |= training
    settings["monitoring"] = {"peak_tflops": peak}
    return write_recipe(folder, settings)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# Pace


def test_the_pace_of_a_clock_that_is_wound_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace = Pace(SampleWork(tokens=1280, flops=3e12), batch_size=32, devices=4, peak=100.0)
    for _ in range(5):
        pace.advance()
        now += 2.0
    now += 30.0
    pace.leave_out(30.0)
    # 160 samples in 10 s; 16 x 3 TFLOP/s over 4 devices.
    assert pace.measure() == {"samples_per_second": 16, "tokens_per_second": 20480, "tflops": 12, "mfu": 0.12}
    pace.advance()
    now += 64.0
    assert pace.measure()["samples_per_second"] == 0.5


def test_a_peak_is_the_recipes_or_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, calls = torch.device("cpu"), []
    assert peak_tflops(312.0, torch.bfloat16, cpu) == (312.0, "as monitoring.peak_tflops says")
    product = torch.mm
    monkeypatch.setattr("torch.mm", lambda a, b: calls.append(a.shape) or product(a, b))
    found, words = peak_tflops(None, torch.float64, cpu)
    assert peak_tflops(None, torch.float64, cpu)[0] == found > 0
    assert calls == [(512, 512)] * 4
    assert words.startswith("measured by a float64 product of 512 x 512, ")
    assert "monitoring.peak_tflops" in words


# FLOPs


def test_flops_of_the_prior_in_closed_form(store: Path) -> None:
    values = smallest_recipe(Path("unused"), None)
    values["prior"]["model"] = {
        "layers": 4, "heads": 3, "d_head": 8, "d_model": 24, "grid": GRID, "layout": ["row", "column", "full", "conv"],
        "conv_kernel": 3,
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    d, image = 24, GRID**2
    length = TEXT + image
    matrices = 2 * 12 * d**2 * length * 4
    # Every query meets the text; of the image all of it on so small a grid, but for columns their own.
    attention = sum(2 * 2 * d * (length * TEXT + image * keys) for keys in (image, GRID, image, image))
    heads = 2 * d * ((TEXT - 1) * (VOCAB + 1) + image * CODES)
    work = PriorTask(recipe, TokenReader(store), build_prior(recipe)).work()
    assert (work.tokens, work.flops) == (length, 3 * (matrices + attention + heads))


def test_flops_of_the_dvae_convolution_by_convolution() -> None:
    recipe = Recipe.model_validate(smallest_recipe(Path("unused"), None))
    model, counted = DVAE(recipe.dvae.model), []

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(layer, Conv2d)
        weight = next(p for p in layer.parameters() if p.dim() == 4)
        counted.append(2 * weight.numel() * out[0, 0].numel())

    for module in model.modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        logits = model.encoder(torch.rand(1, 3, 32, 32))
        model.decoder(logits.softmax(1))
    assert len(counted) > 30
    work = DvaeTask(recipe, [], DVAE(recipe.dvae.model)).work()  # type: ignore[arg-type]
    assert (work.tokens, work.flops) == (16, 3 * sum(counted))


def test_flops_of_clip_in_closed_form(store: Path) -> None:
    recipe = Recipe.model_validate(smallest_recipe(Path("unused"), None))
    width, patches, context = 8, 16, build_recipe_clip(recipe).context_length

    def transformer(length: int) -> int:
        return 24 * width**2 * length + 4 * length**2 * width

    patching, projections = 2 * 3 * 8 * 8 * width * patches, 2 * 2 * width * 8
    work = ClipTask(recipe, [], TokenReader(store), build_recipe_clip(recipe)).work()  # type: ignore[arg-type]
    assert work.tokens == patches + TEXT
    assert work.flops == 3 * (patching + transformer(patches + 1) + transformer(context) + projections)


# A run's journal


def test_the_lines_of_a_run(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe_of(tmp_path, peak=0.25, updates=6)
    recipe = load_recipe(file)
    train_prior(recipe, store, tmp_path / "run")
    task = PriorTask(recipe, TokenReader(store), build_prior(recipe))
    work = task.work()
    said = f"train-prior: {work.flops / 1e9:.3g} GFLOP a sample; mfu is the share of 0.25 TFLOP/s a device, as monitor"
    assert said in capsys.readouterr().err
    trained = [line for line in lines_of(tmp_path / "run") if "lr" in line]
    assert len(trained) == 6
    for line in trained:
        assert line["tokens_per_second"] == pytest.approx(line["samples_per_second"] * (TEXT + GRID**2))
        assert line["tflops"] == pytest.approx(line["samples_per_second"] * work.flops / 1e12)
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.25)
        assert line["loss"] == pytest.approx(line["text"] / 8 + line["image"] * 7 / 8, rel=1e-5)
        assert line["bytes_communicated"] == 0
    # What updates of 4 samples took: part of the seconds that the lines say went by.
    assert 0 < sum(4 / line["samples_per_second"] for line in trained) < trained[-1]["seconds"]

    # The first update's losses and gradient, by autograd on the formula of the paper.
    (batch,) = task.batches(0, 1)
    found = task.model.loss(batch.text, batch.length, batch.image)
    (found.text / 8 + found.image * 7 / 8).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in task.model.parameters() if p.grad is not None)
    assert trained[0]["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)
    assert trained[0]["text"] == pytest.approx(found.text.item(), rel=1e-5)


def test_the_norm_of_gradients_that_are_not_clipped() -> None:
    values = smallest_recipe(Path("unused"), None)
    recipe = Recipe.model_validate(values)
    model = build_prior(recipe)
    state = TrainingState(model, set(model.decayed_parameters()), recipe.prior.adam, recipe.prior.learning_rate)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    squares = sum(number**2 * p.numel() for number, p in enumerate(model.parameters()))
    for clip in (None, 4.0):
        assert float(state.update(0.0, clip)["grad_norm"]) == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_scales_and_skipped_updates_are_counted_and_kept(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(smallest_recipe(Path("unused"), None))

    def state() -> TrainingState:
        model = build_prior(recipe)
        scaling = set_precision(model, "fp16", replicas=1)
        adam, rate = recipe.prior.adam, recipe.prior.learning_rate
        return TrainingState(model, set(model.decayed_parameters()), adam, rate, scaling)

    def update(state: TrainingState, broken: int | None) -> dict[str, float]:
        for parameter in state.parameters:
            parameter.grad = torch.ones_like(parameter)
        if broken is not None:
            state.parameters[state.names.index(f"resblocks.{broken}.out.weight")].grad[0, 0] = torch.inf  # type: ignore[index]
        return {name: float(value) for name, value in state.update(1e-3, 4.0).items()}

    first = state()
    assert first.scaling is not None
    first.scaling.scales.exponents[2:4] = [HIGHEST, HIGHEST - 1]
    lines = [update(first, broken) for broken in (None, 0, None, 5)]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 2]
    assert [line["skipped"] > 0 for line in lines] == [False, True, False, True]
    assert [line["scales_at_bounds"] for line in lines] == [1, 2, 2, 2]
    assert lines[0]["log2_scale_max"] == 24
    assert lines[0]["log2_scale_min"] == 13
    assert lines[2]["log2_scale_min"] == pytest.approx(13.001 - 0.5)

    saved = tmp_path / "step-00000004"
    save_checkpoint(saved, kind="prior", step=4, recipe=recipe, belongs={}, metrics={}, **first.contents(4))
    second = state()
    second.load(open_checkpoint(saved))
    assert update(second, None)["skipped_updates"] == 2
    assert update(second, 1)["skipped_updates"] == 3


# Weights & Biases


def test_weights_and_biases_has_what_the_journal_has(store: Path, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    (tmp_path / "sent").mkdir()
    recipe, out = recipe_of(tmp_path, updates=12, save_every=4, validate_every=6), tmp_path / "run"
    command = [DALLE, "train-prior", recipe, "--tokens", store, "--out", out, "--wandb", "shapes"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "modules"), "FAKE_WANDB": str(tmp_path / "sent")}

    def run(updates: int) -> subprocess.CompletedProcess[str]:
        told = [*map(str, command), "--set", f"prior.training.updates={updates}"]
        told += ["--set", "prior.learning_rate.schedule=constant"]
        return subprocess.run(told, env=environment, capture_output=True, text=True, timeout=600)

    assert (done := run(10)).returncode == 0, done.stderr
    # What was saved last is lost: updates 9 and 10 are done again, and then two more.
    step = out / "step-00000010"
    (step / "manifest.json").unlink()
    assert (done := run(12)).returncode == 0 and "goes on from step-00000008" in done.stderr, done.stderr

    told = [json.loads(line) for line in (tmp_path / "sent" / "init.jsonl").read_text().splitlines()]
    assert len(told) == 2
    assert len({each["id"] for each in told}) == 1
    for each in told:
        assert (each["project"], each["name"], each["resume"]) == ("shapes", "smallest prior", "allow")
        assert each["config"]["stage"] == "prior"
        assert each["config"]["prior"]["model"]["layers"] == 3
    sent = tmp_path / "sent" / f"{told[0]['id']}.jsonl"
    assert sent.with_suffix(".finished").exists()
    found = [json.loads(line) for line in sent.read_text().splitlines()]
    # The first run validated at its end, update 10; the journal took that back, a service cannot.
    found = [line for line in found if not (line["step"] == 10 and "validation/loss" in line)]
    expected = []
    for line in lines_of(out):
        part = "train" if "lr" in line else "validation"
        values = {k.removeprefix("val_"): v for k, v in line.items() if k not in ("step", "seconds")}
        expected.append({"step": line["step"], **{f"{part}/{name}": value for name, value in values.items()}})
    timed = {f"train/{name}" for name in PACE}
    assert [{k: v for k, v in line.items() if k not in timed} for line in found] == [
        {k: v for k, v in line.items() if k not in timed} for line in expected
    ]
    assert all(timed <= line.keys() for line in found if "train/loss" in line)

    (tmp_path / "sent" / "broken").touch()
    failed = run(14)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1] == (
        "dalle: --wandb shapes: Weights & Biases does not start (api_key not configured (no-tty)); run wandb login, or "
        "set WANDB_MODE=offline, or leave it out"
    )


def test_weights_and_biases_is_not_installed(
    store: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("train-prior", recipe_of(tmp_path), "--tokens", store, "--out", tmp_path / "run", "--wandb", "shapes")
    assert "--wandb shapes: Weights & Biases is not installed; pip install wandb, or leave it out" in done.mistake()
    assert not (tmp_path / "run").exists()
