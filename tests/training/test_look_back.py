"""Tests of values that are looked at an update late on a GPU."""

from __future__ import annotations

import pytest
import torch

from dalle_cli.distributed.group import Group
from dalle_cli.training.look_back import LookBack


def test_a_cpu_looks_at_once() -> None:
    seen = LookBack(Group())
    seen.note_loss(1, torch.tensor(2.5))
    assert list(seen.losses()) == [(1, 2.5)]
    assert list(seen.losses(every=True)) == []
    assert seen.any_request(True)
    assert not seen.any_request(False)


def test_a_gpu_looks_an_update_late_and_at_every_update_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the group is on a GPU here; the tensors are on the CPU."""
    group = Group(size=2, device=torch.device("cuda"))
    monkeypatch.setattr(Group, "sum", lambda self, value: value)
    seen = LookBack(group)
    found = []
    for update in range(1, 5):
        seen.note_loss(update, torch.tensor(float(update)))
        found.append(list(seen.losses()))
    assert found == [[], [(1, 1.0)], [(2, 2.0)], [(3, 3.0)]]
    assert list(seen.losses(every=True)) == [(4, 4.0)]
    assert [seen.any_request(flag) for flag in (False, True, False, False)] == [False, False, True, False]
