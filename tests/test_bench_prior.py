"""What scripts/bench-prior compares is the same computation, and its table holds what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from bench_prior import attention, step
from bench_prior.naive import make_naive, naive_loss
from bench_prior.report import render
from bench_prior.timing import Contender, libraries, race

from dalle_cli.prior.transformer import Prior
from dalle_cli.recipes.schema import PriorModel

SMALL = step.Sizes(
    layers=2, heads=2, d_head=4, grid=9, text_length=3, text_vocab=11, image_vocab=7, batches=(2,), rounds=1
)


def test_the_naive_prior_is_the_same() -> None:
    model = PriorModel(layers=4, heads=2, d_head=4, d_model=8, grid=9, conv_kernel=5, layout="row column conv full")
    ours, naive = (Prior(model, 3, 11, 7).double() for _ in range(2))
    make_naive(naive)
    text, length, image = step.draw_batch(SMALL, 2, "cpu")
    losses = [step.ours(ours, text, length, image)(), naive_loss(naive, text, image)]
    assert abs(losses[0] - losses[1]) < 1e-12
    gradients = [
        torch.autograd.grad(loss, list(prior.parameters())) for loss, prior in zip(losses, (ours, naive), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_parts_report_every_contender() -> None:
    def log(line: str) -> None:
        lines.append(line)

    lines: list[str] = []
    found = step.measure(SMALL, None, "cpu", log)
    names = {row["name"] for row in found["rows"]}
    assert {f"dalle fp32, {library}" for library in libraries()} <= names and "mask and whole logits" in names
    assert all(row["ms"] > 0 and row["gflops"] > 0 for row in found["rows"])
    sizes = attention.Sizes(heads=1, d_head=4, grid=9, text_length=3, batches=(1,), rounds=1)
    patterns = attention.measure(sizes, "cpu", log)
    assert len(patterns["rows"]) == 7 * len(libraries()) and all(ratio["ratio"] > 0 for ratio in patterns["ratios"])
    assert len(lines) == len(found["rows"]) + len(patterns["rows"])
    table = render({"step": {"machine": {"command": "c", "date": "d"}, **found}})
    assert "`c`: date d." in table and "| 2 | mask and whole logits |" in table


def test_a_race_gives_medians_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 9, 0, 9, 0, 1, 0, 5, 0, 3])  # two that warm up, then 1, 5 and 3
    monkeypatch.setattr("bench_prior.timing.time.perf_counter", lambda: next(clock))
    assert race({"one": Contender(lambda: None, fast=False)}, 3) == {"one": 3}
