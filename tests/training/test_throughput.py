"""Throughput and FLOPs in the journal, against figures worked out independently."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.running import smallest_recipe, write_recipe
from helpers.token_stores import write_tokens
from torch import Tensor, nn

from dalle_cli.clip.train import ClipTask, build_recipe_clip
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.dvae.model import DVAE, Conv2d
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask, train_prior
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.throughput import SampleWork, Throughput, peak_tflops, precision_warning

TEXT, VOCAB, GRID, CODES = 48, 400, 4, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.zarr", 80, TEXT, VOCAB, GRID, CODES)


def recipe_of(folder: Path, peak: float, **training: Any) -> Path:
    settings = smallest_recipe(folder, None)
    settings["prior"]["training"] |= training
    settings["monitoring"] = {"peak_tflops": peak}
    return write_recipe(folder, settings)


def journal_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_throughput_by_a_clock_set_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    throughput = Throughput(SampleWork(tokens=1280, flops=3e12), batch_size=32, devices=4, peak=100.0)
    for _ in range(5):
        throughput.count_update()
        now += 2.0
    with throughput.paused():
        now += 30.0
    # 160 samples in 10 s; 16 x 3 TFLOP/s over 4 devices.
    assert throughput.measure() == {"samples_per_second": 16, "tokens_per_second": 20480, "tflops": 12, "mfu": 0.12}
    throughput.count_update()
    now += 64.0
    assert throughput.measure()["samples_per_second"] == 0.5


def test_the_peak_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, calls = torch.device("cpu"), []
    product = torch.mm
    monkeypatch.setattr("torch.mm", lambda a, b: calls.append(a.shape) or product(a, b))
    found = peak_tflops(torch.float64, cpu)
    assert peak_tflops(torch.float64, cpu) == found > 0
    assert calls == [(512, 512)] * 4


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
    # Every query meets the whole text and, on so small a grid, the whole image; column attention only its column.
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


def test_the_journal_of_a_run(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe_of(tmp_path, peak=0.25, updates=6)
    recipe = load_recipe(file)
    train_prior(recipe, store, tmp_path / "run")
    task = PriorTask(recipe, TokenReader(store), build_prior(recipe))
    work = task.work()
    message = (
        f"train-prior: {work.flops / 1e9:.3g} GFLOP a sample; mfu is the share of 0.25 TFLOP/s a device, as monitor"
    )
    assert message in capsys.readouterr().err
    trained = [line for line in journal_lines(tmp_path / "run") if "lr" in line]
    assert len(trained) == 6
    for line in trained:
        assert line["tokens_per_second"] == pytest.approx(line["samples_per_second"] * (TEXT + GRID**2))
        assert line["tflops"] == pytest.approx(line["samples_per_second"] * work.flops / 1e12)
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.25)
        assert line["loss"] == pytest.approx(line["text"] / 8 + line["image"] * 7 / 8, rel=1e-5)
        assert line["bytes_communicated"] == 0
    # The time of the updates, of 4 samples each, is part of the seconds in the lines.
    assert 0 < sum(4 / line["samples_per_second"] for line in trained) < trained[-1]["seconds"]

    # The first update's losses and gradient norm, by autograd on the paper's formula.
    (batch,) = task.batches(0, 1)
    found = task.model.loss(batch.text, batch.length, batch.image)
    (found.text / 8 + found.image * 7 / 8).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in task.model.parameters() if p.grad is not None)
    assert trained[0]["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)
    assert trained[0]["text"] == pytest.approx(found.text.item(), rel=1e-5)


def test_the_log_speaks_of_the_peak_only_where_the_recipe_does(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(recipe_of(tmp_path, peak=0.25, updates=2), ["monitoring.peak_tflops="])
    train_prior(recipe, store, tmp_path / "run")
    assert "FLOP" not in capsys.readouterr().err
    assert journal_lines(tmp_path / "run")[0]["mfu"] > 0


def test_products_slow_on_a_cpu_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {torch.float32: 0.15, torch.bfloat16: 0.3, torch.float16: 0.0015}
    monkeypatch.setattr("dalle_cli.training.throughput.peak_tflops", lambda dtype, _device: peaks[dtype])
    cpu, key = torch.device("cpu"), "prior.precision"
    for dtype in (torch.float32, torch.bfloat16):
        assert precision_warning(key, dtype, cpu) is None
    assert precision_warning(key, torch.float16, torch.device("cuda")) is None
    warning = precision_warning(key, torch.float16, cpu)
    assert warning is not None
    assert "prior.precision: fp16 is for GPUs; a product takes 100.0 times as long" in warning
    peaks |= {torch.float16: 0.14, torch.bfloat16: 0.005}
    assert "fp16 is for GPUs; a product takes 1.1 times" in (precision_warning(key, torch.float16, cpu) or "")
    bf16 = "bf16 is for processors with instructions for it; a product takes 30.0 times as long as in fp32 on this CPU"
    assert precision_warning(key, torch.bfloat16, cpu) == f"prior.precision: {bf16}"
