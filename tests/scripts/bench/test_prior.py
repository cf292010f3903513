"""The contenders of scripts/bench/prior compute the same thing, and its table shows what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.running import smallest_recipe
from prior_parts import attention, recipe, step
from prior_parts.naive import make_naive, naive_loss
from prior_parts.report import render
from prior_parts.timing import Contender, libraries, median_seconds

from dalle_cli.config.schema import PriorModel, Recipe
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import Prior

SMALL = step.Sizes(
    layers=2, heads=2, d_head=4, grid=9, text_length=3, text_vocab=11, image_vocab=7, batches=(2,), rounds=1
)


def test_the_naive_prior_has_the_same_loss_and_gradients() -> None:
    model = PriorModel(layers=4, heads=2, d_head=4, d_model=8, grid=9, conv_kernel=5, layout="row column conv full")
    ours, naive = (Prior(model, 3, 11, 7).double() for _ in range(2))
    make_naive(naive)
    text, length, image = step.draw_batch(SMALL, 2, "cpu")
    losses = [step.training_loss(ours, text, length, image)(), naive_loss(naive, text, image)]
    assert abs(losses[0] - losses[1]) < 1e-12
    gradients = [
        torch.autograd.grad(loss, list(prior.parameters())) for loss, prior in zip(losses, (ours, naive), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_parts_report_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("step", "timing"):  # the full size takes minutes on a CPU without bf16 instructions
        monkeypatch.setattr(f"prior_parts.{module}.SIDE", 64)

    def log(line: str) -> None:
        lines.append(line)

    lines: list[str] = []
    found = step.measure(SMALL, None, "cpu", log)
    names = {row["name"] for row in found["rows"]}
    assert {f"dalle fp32, {library}" for library in libraries()} <= names
    assert step.NAIVE in names
    assert all(row["ms"] > 0 and row["gflops"] > 0 for row in found["rows"])
    sizes = attention.Sizes(heads=1, d_head=4, grid=9, text_length=3, batches=(1,), rounds=1)
    patterns = attention.measure(sizes, "cpu", log)
    assert len(patterns["rows"]) == 7 * len(libraries())
    assert all(ratio["ratio"] > 0 for ratio in patterns["ratios"])
    assert len(lines) == len(found["rows"]) + len(patterns["rows"])
    table = render({"step": {"machine": {"command": "c", "date": "d"}, **found}})
    assert "`c`: date d." in table
    assert f"| 2 | {step.NAIVE} |" in table


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_measure_a_whole_recipe(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for a GPU runs on a CPU too."""
    monkeypatch.setattr(recipe, "SAMPLES", 3)
    monkeypatch.setattr(recipe, "COPIED_BYTES", {"cpu": 2**20})
    settings = smallest_recipe(Path("run"), None)
    settings["prior"]["precision"] = precision
    lines: list[str] = []
    found = recipe.measure(Recipe.model_validate(settings), "cpu", lines.append)
    assert [row["name"] for row in found["rows"]] == [f"update, {precision}", "samples, bf16"]
    assert len(lines) == 2
    assert found["rows"][0]["share of the matmul peak"] > 0
    assert found["rows"][1]["share of the bandwidth"] > 0
    assert "| update, " in render({"recipe": {"machine": {"command": "c"}, **found}})


def test_bytes_that_sampling_reads() -> None:
    """The count agrees with one by hand, of values in 32 bit.

    There are 8 steps. Each reads two layers of 12 d^2, a head of d V, the cached text of 2 T d a layer, and the cache
    slots of each image that its position attends to.
    """
    model = PriorModel(layers=2, heads=2, d_head=4, d_model=8, grid=3, conv_kernel=3, layout="row column")
    decoder = Decoder(Prior(model, 5, 11, 7), "fp32")
    row, column = sum(min(p + 1, 4) for p in range(8)), sum(p // 3 + 1 for p in range(8))
    values = 8 * (2 * 12 * 64 + 8 * 7 + 2 * 2 * 5 * 8) + 10 * 2 * 8 * (row + column)
    assert recipe.bytes_read(decoder, 10) == 4 * values


def test_timings_are_medians_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 9, 0, 9, 0, 1, 0, 5, 0, 3])  # two rounds of warm-up, then 1, 5 and 3
    monkeypatch.setattr("prior_parts.timing.time.perf_counter", lambda: next(clock))
    assert median_seconds({"one": Contender(lambda: None, fast=False)}, 3) == {"one": 3}
