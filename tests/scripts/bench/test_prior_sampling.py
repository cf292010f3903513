"""The arithmetic of the sampling benchmark is right, and its cases run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from prior_parts import sampling_memory
from prior_parts.model import build_prior
from prior_parts.sampling import (
    AS_CALLED,
    CACHED,
    Sizes,
    distinct_captions,
    mean_over_image,
    measure,
    our_step,
    repeat_cache,
    speed_ratios,
)

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.prior.decode import Decoder
from dalle_cli.sampling.draw import sample_images

SMALL = Sizes(2, heads=2, d_head=4, grid=4, text_length=4, text_vocab=100, image_vocab=7, batches=(1, 8, 64))


def test_steps_between_timed_positions_are_interpolated() -> None:
    steps = {10: 1.0, 300: 3.0, 700: 4.0, 1020: 9.0}
    wanted = np.interp(np.linspace(0, 1024, 1_000_001), list(steps), list(steps.values())).mean()
    assert mean_over_image(steps, 1024) == pytest.approx(wanted, rel=1e-6)


def test_all_parts_of_a_cache_are_repeated() -> None:
    cache: dict[str, Any] = {"offset": 5, "attention": (torch.ones(1, 2, 3), torch.zeros(1, 2, 3))}
    found = repeat_cache(cache, 4)
    assert found["offset"] == 5
    assert [part.shape for part in found["attention"]] == [(4, 2, 3)] * 2


def test_a_small_run() -> None:
    lines: list[str] = []
    found = measure(SMALL, None, lines.append)
    assert [(row["batch"], row["name"]) for row in found["rows"]] == [
        (1, "dalle fp32, 1 caption"),
        (1, "dalle bf16, 1 caption"),
        (1, "dalle int8, 1 caption"),
        (8, "dalle fp32, 1 caption"),
        (8, "dalle fp32, 8 captions"),
        (8, "dalle bf16, 1 caption"),
        (8, "dalle bf16, 8 captions"),
        (8, "dalle int8, 1 caption"),
        (8, "dalle int8, 8 captions"),
        (64, "dalle fp32, 1 caption"),
        (64, "dalle bf16, 1 caption"),
        (64, "dalle int8, 1 caption"),
    ]
    assert len(lines) == 12
    assert not found["ratios"]
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(16 * row["images_per_second"])
        assert row["whole_images_tokens_per_second"] > 0
        assert row["timed"] == "3 x 3 steps at positions 0, 4, 8, 12"


@pytest.mark.parametrize(("start", "captions", "n"), [(0, 1, 5), (4, 3, 1), (12, 2, 2)])
def test_a_timed_step_is_one_of_sample_images(start: int, captions: int, n: int) -> None:
    """The timed steps draw the same tokens as ``sample_images`` does after the same prefix."""
    decoder = Decoder(build_prior(SMALL).eval().requires_grad_(False))
    text_ids, prefix = distinct_captions(decoder, captions), torch.zeros(captions, start, dtype=torch.int64)
    uniforms = torch.rand(captions, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted, _ = sample_images(decoder, text_ids, uniforms, SamplingSettings(), prefix)
    step = our_step(decoder, text_ids, start, uniforms)
    for position in range(start, start + 3):
        assert step().equal(wanted[..., position])
    assert step().shape == (captions, n)  # the row starts over


def test_ratios_have_their_goals() -> None:
    speeds = {"dalle fp32, 1 caption": 50.0, "dalle bf16, 8 captions": 80.0, "dalle int8, 1 caption": 90.0}
    speeds |= {CACHED: 10.0, AS_CALLED: 0.5}
    rows = [{"batch": batch, "name": name, "tokens_per_second": speeds[name]} for batch in (1, 8) for name in speeds]
    found = {(r["ours"], r["peer"]): (r["ratio"], r.get("goal")) for r in speed_ratios(rows) if r["batch"] == 8}
    assert found == {
        ("dalle fp32, 1 caption", CACHED): (5, 5),
        ("dalle fp32, 1 caption", AS_CALLED): (100, 100),
        ("dalle bf16, 8 captions", CACHED): (8, 8),
        ("dalle bf16, 8 captions", AS_CALLED): (160, 100),
        ("dalle int8, 1 caption", CACHED): (9, None),
        ("dalle int8, 1 caption", AS_CALLED): (180, None),
    }
    assert not any("goal" in ratio for ratio in speed_ratios(rows) if ratio["batch"] == 1)


def test_peak_memory_with_and_without_a_cache() -> None:
    """The system's figures are read in this process."""
    for precision in ("fp32", "int8", None):
        start, peak = sampling_memory.peak_memory(SMALL, precision, 2)
        assert 0 < start <= peak
