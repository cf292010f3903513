"""Tests of the time and cost of training, against figures computed by hand."""

from __future__ import annotations

import pytest
from helpers.prior_recipes import tiny_prior

from dalle_cli.planning.cost import Assumptions, checkpoint_cost
from dalle_cli.planning.memory import Machines
from dalle_cli.planning.plan import plan
from dalle_cli.prior.counts import count_flops, count_parameters


def test_cost_of_a_checkpoint() -> None:
    """Two machines of four ranks write weights, EMA weights, moments and errors once, and each rank's factors."""
    recipe = tiny_prior(prior__sharding__zero=3, prior__powersgd__rank=8, prior__training__save_every=5)
    counts, machines = count_parameters(recipe), Machines(4, 2, 10**9)
    found, parameters = checkpoint_cost(recipe.prior, counts, machines, 1000.0, 2.0), 6144 + 416 + 15_745
    assert found.model == 4 * parameters * (1 + 1 + 2) + 4 * 12 * 256 * 2
    assert found.each_process == 4 * 64 * 2 * 2
    assert found.bytes == found.model + 8 * found.each_process
    assert found.first_machine == found.model + 4 * found.each_process
    assert found.seconds == found.first_machine / 1000
    assert found.share == pytest.approx(found.seconds / (found.seconds + 10))
    cold = tiny_prior(prior__sharding__zero=3, prior__powersgd__rank=8, prior__powersgd__warm_start=False)
    assert checkpoint_cost(cold.prior, counts, machines, 1000.0, 2.0).each_process == 0
    assert checkpoint_cost(recipe.prior, counts, Machines(4, 1, 10**9), 1000.0, 2.0).each_process == 0


def test_time_and_cost_of_training() -> None:
    recipe = tiny_prior(prior__model__checkpoint_resblocks=True, prior__training__updates=3600, prior__sharding__zero=3)
    machines = Machines(2, 4, 10**9)
    found = plan(recipe, machines, Assumptions(peak_flops=1e6, share=0.5, interconnect=8e3, price=2.0))
    flops = count_flops(recipe, count_parameters(recipe))
    assert flops.executed == 3 * flops.heads + 4 * (flops.matrices + flops.attention)
    compute = 2 * flops.executed / 0.5e6  # 16 samples among 8 ranks
    assert found.between_machines is not None
    link = found.between_machines.a_machine_on_the_link.sent
    assert found.time.compute_seconds == pytest.approx(compute)
    assert found.time.step_seconds == pytest.approx(compute + link / 1e3)
    step = found.time.step_seconds
    assert found.time.tokens_per_second == pytest.approx(16 * 24 / step)
    assert found.time.gpu_hours == pytest.approx(8 * step)  # 3600 updates
    assert found.time.cost == pytest.approx(16 * step)
    text = " ".join(found.assumptions)
    for said in ("1e-06 TFLOP/s", "50% of that", "8e-06 Gbit/s", "costs 2 an hour", "10% of memory"):
        assert said in text
