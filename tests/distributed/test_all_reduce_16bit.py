"""The 16-bit all-reduce over 2, 3 and 4 nodes, against the format's definition in 64 bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.two_nodes import NUMBERS, run_scenario, spread
from numpy.typing import NDArray

NODES = (2, 3, 4)
LARGEST = 16 - 2.0**-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_scenario("means", tmp_path_factory.mktemp("means"))


def step(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance between neighbouring 1-6-9 numbers: nine bits behind the leading one, down to 2^-59."""
    _, exponent = np.frexp(values)
    return 2.0 ** (np.where(values == 0, -59, np.maximum(exponent - 1, -59)) - 9)


def nearest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(np.rint(values / step(values)) * step(values), -LARGEST, LARGEST)


@pytest.mark.parametrize("nodes", NODES)
def test_the_mean_of_what_was_sent(nodes: int, found: list[dict[str, Any]]) -> None:
    beyond = 0
    for count in NUMBERS:
        cases = [own[f"{nodes} {count}"] for own in found[:nodes]]
        values = np.stack([spread(rank, count).double().numpy() for rank in range(nodes)])
        sent = np.stack([case["sent"].double().numpy() for case in cases])
        np.testing.assert_array_equal(sent, nearest(values))
        mean = sent.mean(0)
        # Rounded to nearest, except that a 32-bit sum may be on the other side of the midpoint.
        off = np.abs(cases[0]["mean"].double().numpy() - mean)
        assert (off <= (0.5 + 1e-3) * step(mean)).all()
        beyond += int((np.abs(values) > LARGEST).sum()) + int(((values != 0) & (sent == 0)).sum())
        assert all(case["mean"].numpy().tobytes() == cases[0]["mean"].numpy().tobytes() for case in cases)
    assert beyond > 3  # numbers beyond both ends of the format were tested


@pytest.mark.parametrize("nodes", NODES)
def test_a_non_finite_number_on_one_rank_is_so_on_all(nodes: int, found: list[dict[str, Any]]) -> None:
    for own in found[:nodes]:
        mean = own[f"{nodes} broken"]["mean"]
        assert mean.isnan().nonzero().flatten().tolist() == [10, 20, 30]
        assert torch.equal(mean.isfinite(), ~mean.isnan())


@pytest.mark.parametrize("nodes", NODES)
def test_two_bytes_per_number_are_sent_twice(nodes: int, found: list[dict[str, Any]]) -> None:
    """Codes are padded to equal parts for all nodes, and passed to the collective twice."""
    for count in NUMBERS:
        for own in found[:nodes]:
            assert own[f"{nodes} {count}"]["handed"] == [2 * nodes * -(-count // nodes)] * 2
