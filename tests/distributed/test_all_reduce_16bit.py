"""Means in 16 bit among 2, 3 and 4 processes, against the format's definition in 64 bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.four_processes import four_processes
from helpers.two_nodes import NUMBERS, spread
from numpy.typing import NDArray

MACHINES = (2, 3, 4)
LARGEST = 16 - 2.0**-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return four_processes("means", tmp_path_factory.mktemp("means"))


def step(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From a number of 1-6-9 to the next, at ``values``: nine bits behind the leading one, down to 2^-59."""
    _, exponent = np.frexp(values)
    return 2.0 ** (np.where(values == 0, -59, np.maximum(exponent - 1, -59)) - 9)


def nearest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(np.rint(values / step(values)) * step(values), -LARGEST, LARGEST)


@pytest.mark.parametrize("machines", MACHINES)
def test_a_mean_of_what_was_sent(machines: int, found: list[dict[str, Any]]) -> None:
    beyond = 0
    for count in NUMBERS:
        cases = [own[f"{machines} {count}"] for own in found[:machines]]
        values = np.stack([spread(rank, count).double().numpy() for rank in range(machines)])
        sent = np.stack([case["sent"].double().numpy() for case in cases])
        np.testing.assert_array_equal(sent, nearest(values))
        mean = sent.mean(0)
        # To the nearest, but that a sum in 32 bit may fall to the other side of the middle.
        off = np.abs(cases[0]["mean"].double().numpy() - mean)
        assert (off <= (0.5 + 1e-3) * step(mean)).all()
        beyond += int((np.abs(values) > LARGEST).sum()) + int(((values != 0) & (sent == 0)).sum())
        assert all(case["mean"].numpy().tobytes() == cases[0]["mean"].numpy().tobytes() for case in cases)
    assert beyond > 3  # the format's ends were met


@pytest.mark.parametrize("machines", MACHINES)
def test_what_is_not_finite_at_one_is_so_at_all(machines: int, found: list[dict[str, Any]]) -> None:
    for own in found[:machines]:
        mean = own[f"{machines} broken"]["mean"]
        assert mean.isnan().nonzero().flatten().tolist() == [10, 20, 30]
        assert torch.equal(mean.isfinite(), ~mean.isnan())


@pytest.mark.parametrize("machines", MACHINES)
def test_twice_two_bytes_a_number_are_handed_over(machines: int, found: list[dict[str, Any]]) -> None:
    """Filled up to the same for each machine: the first time its part of mine, the second mine for it."""
    for count in NUMBERS:
        for own in found[:machines]:
            assert own[f"{machines} {count}"]["handed"] == [2 * machines * -(-count // machines)] * 2
