"""Schedules against their closed forms, and the plateau schedule step by step."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.config.schema import LearningRate, Ramp, Recipe
from dalle_cli.training.schedules import Plateau, learning_rate, ramp

number = st.floats(-100, 100)


@given(start=number, end=number, updates=st.integers(1, 10_000), shape=st.sampled_from(["linear", "cosine"]),
       steps=st.lists(st.integers(0, 20_000), min_size=1, max_size=10))  # fmt: skip
def test_a_ramp_is_its_closed_form_in_any_order(
    start: float, end: float, updates: int, shape: Any, steps: list[int]
) -> None:
    settings_ = Ramp(start=start, end=end, updates=updates, shape=shape)
    for step in (*steps, *sorted(steps), 0, updates):
        done = min(step / updates, 1)
        share = done if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * done)
        assert ramp(settings_, step) == pytest.approx((1 - share) * start + share * end, abs=1e-9)
    assert ramp(settings_, updates) == ramp(settings_, 10 * updates) == end
    assert ramp(Ramp(start=start, end=end, updates=0), 0) == end


def test_an_exponential_ramp_halves_evenly_and_a_number_is_a_constant_one() -> None:
    falling = Ramp(start=8.0, end=1.0, updates=30, shape="exponential")
    assert [ramp(falling, step) for step in (0, 10, 20, 30, 99)] == pytest.approx([8, 4, 2, 1, 1])
    with pytest.raises(ValueError, match="positive"):
        Ramp(start=1.0, end=0.0, updates=3, shape="exponential")
    assert ramp(Ramp.model_validate(50), 7) == 50.0


def test_the_papers_temperature_depends_on_the_step_alone() -> None:
    temperature = Recipe().dvae.objective.temperature
    steps = list(range(0, 200_000, 997))
    forwards = [ramp(temperature, step) for step in steps]
    shuffled = random.Random(0).sample(range(len(steps)), len(steps))
    assert all(ramp(temperature, steps[i]) == forwards[i] for i in shuffled)
    # An annealing that multiplies or subtracts at each call would move on here.
    assert len({ramp(temperature, 75_000) for _ in range(1000)}) == 1
    assert ramp(temperature, 75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert (forwards[0], forwards[-1]) == (1.0, 1 / 16)
    assert all(a >= b for a, b in itertools.pairwise(forwards))


@given(peak=st.floats(1e-6, 1), share=st.floats(0, 1), warmup=st.integers(0, 50), updates=st.integers(60, 500))
def test_the_learning_rate_warms_up_and_ends_at_final(peak: float, share: float, warmup: int, updates: int) -> None:
    final = peak * share
    cosine = LearningRate(peak=peak, warmup_updates=warmup, final=final)
    rates = [learning_rate(cosine, step, updates) for step in range(updates + 10)]
    for step in range(warmup):
        assert rates[step] == pytest.approx(peak * (step + 1) / warmup)
    assert rates[warmup] == pytest.approx(peak)
    assert all(rate == pytest.approx(final) for rate in rates[updates:])
    middle = (warmup + updates) / 2
    if middle == int(middle):
        assert rates[int(middle)] == pytest.approx((peak + final) / 2)
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    early = LearningRate(peak=peak, warmup_updates=warmup, final=final, decay_updates=55)
    assert learning_rate(early, 55, updates) == pytest.approx(final)
    constant = LearningRate(peak=peak, warmup_updates=warmup, schedule="constant")
    assert learning_rate(constant, updates, updates) == peak


def test_a_plateau_halves_after_validations_without_gain() -> None:
    rate = LearningRate(peak=0.4, schedule="plateau", plateau_validations=3, plateau_threshold=0.01, final=0.06)
    plateau, seen = Plateau(rate), []
    #          gain                  a gain too small  three stale      gain, then three, three and three stale
    for loss in (2.0, 1.5, 1.6, 1.55, 1.4999, 1.0, 1.0, 1.2, 1.3, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1):
        plateau.observe(loss)
        seen.append(plateau.halvings)
    assert seen == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    rates = [learning_rate(rate, 10, 100, halvings) for halvings in range(4)]
    assert rates == pytest.approx([0.4, 0.2, 0.1, 0.06])
    again = Plateau(rate, dict(plateau.state))
    assert again.halvings == 4
    falling = Plateau(rate)
    for loss in (-1.0, -1.005, -1.5, -2.0):  # a likelihood may be below zero
        falling.observe(loss)
    assert (falling.state["best"], falling.state["stale"], falling.halvings) == (-2.0, 0, 0)


def test_the_paper_halves_five_times_at_most() -> None:
    assert LearningRate(peak=1).plateau_halvings == 5
    for most, wanted in ((5, 5), (2, 2), (None, 20)):
        plateau = Plateau(LearningRate(peak=0.4, schedule="plateau", plateau_validations=1, plateau_halvings=most))
        for _ in range(21):
            plateau.observe(1.0)
        assert plateau.halvings == wanted


def test_a_plateau_of_the_training_loss_is_one_of_its_means() -> None:
    rate, rng = LearningRate(peak=0.4, schedule="plateau", plateau_validations=2), np.random.default_rng(0)
    watching, by_mean = Plateau(rate), Plateau(rate)
    for window in range(12):
        losses = rng.normal(1 / (1 + min(window, 4)), 0.3, 7 + window)
        for loss in losses:
            watching.add_training_loss(float(loss))
            watching = Plateau(rate, dict(watching.state))  # as after a kill within the window
        watching.observe_training()
        by_mean.observe(float(np.mean(losses)))
        assert watching.state["best"] == pytest.approx(by_mean.state["best"])
        assert watching.halvings == by_mean.halvings
    assert watching.halvings > 0
    before = dict(watching.state)
    watching.observe_training()  # nothing was added
    assert watching.state == before
