"""The benchmark's own arithmetic, and that its cases run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from bench_prior.sampling import Sizes, _widened, mean_over_image, measure


def test_steps_between_the_timed_ones_are_interpolated() -> None:
    steps = {10: 1.0, 300: 3.0, 700: 4.0, 1020: 9.0}
    wanted = np.interp(np.linspace(0, 1024, 1_000_001), list(steps), list(steps.values())).mean()
    assert mean_over_image(steps, 1024) == pytest.approx(wanted, rel=1e-6)


def test_a_cache_is_widened_in_all_its_parts() -> None:
    cache: dict[str, Any] = {"offset": 5, "attention": (torch.ones(1, 2, 3), torch.zeros(1, 2, 3))}
    found = _widened(cache, 4)
    assert found["offset"] == 5 and [part.shape for part in found["attention"]] == [(4, 2, 3)] * 2


def test_a_small_run() -> None:
    lines: list[str] = []
    sizes = Sizes(2, heads=2, d_head=4, grid=4, text_length=4, text_vocab=100, image_vocab=7, batches=(1, 8, 64))
    found = measure(sizes, None, lines.append)
    assert [(row["batch"], row["name"]) for row in found["rows"]] == [
        (1, "dalle fp32, 1 caption"),
        (1, "dalle bf16, 1 caption"),
        (8, "dalle fp32, 1 caption"),
        (8, "dalle fp32, 8 captions"),
        (8, "dalle bf16, 1 caption"),
        (8, "dalle bf16, 8 captions"),
        (64, "dalle fp32, 1 caption"),
        (64, "dalle bf16, 1 caption"),
    ]
    assert len(lines) == 8 and not found["ratios"]
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(16 * row["images_per_second"])
