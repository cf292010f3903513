"""Tests of values on their way to the host's memory."""

from __future__ import annotations

from typing import Any, cast

import torch

from dalle_cli.transfers import OnItsWay, send


def test_values_on_their_way_are_read_after_their_arrival() -> None:
    values = torch.zeros(3)

    class Arrival:
        def synchronize(self) -> None:
            values.copy_(torch.tensor([1.0, 0.0, 2.5]))

    assert OnItsWay(values, cast(Any, Arrival())).read() == [1.0, 0.0, 2.5]


def test_values_in_the_hosts_memory_are_there() -> None:
    value = torch.tensor(2.5, requires_grad=True)
    assert OnItsWay.of(value).read() == [2.5]
    assert send(value, value.device) is value
