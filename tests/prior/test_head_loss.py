"""Tests of the sliced cross-entropy against the cross-entropy of whole logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.prior import head_loss as module
from dalle_cli.prior.head_loss import head_loss


def inputs(rows: int, width: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 100 + classes)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, width), (classes, width), (classes,))
    )
    return x, weight, bias, torch.randint(classes, (rows,), generator=generator)


@settings(max_examples=60)
@given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 9), st.integers(1, 100))
def test_values_and_gradients(rows: int, width: int, classes: int, chunk: int) -> None:
    *leaves, targets = inputs(rows, width, classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = head_loss(*leaves, targets)
    wanted = F.cross_entropy(F.linear(*leaves), targets, reduction="sum")
    assert abs(found - wanted) < 1e-9
    gradients = [torch.autograd.grad(0.7 * loss, leaves) for loss in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-9 if one.numel() else one.shape == other.shape


def test_unlikely_targets_have_a_finite_loss() -> None:
    x, bias = torch.ones(2, 1, requires_grad=True), torch.zeros(3)
    weight = torch.tensor([[0.0], [500.0], [200.0]])
    loss = head_loss(x, weight, bias, torch.tensor([0, 1]))
    assert loss == 500
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[500.0], [0.0]]


def test_without_gradients() -> None:
    x, weight, bias, targets = inputs(5, 3, 4)
    with torch.no_grad():
        found = head_loss(x, weight, bias, targets)
    assert not found.requires_grad
    assert abs(found - F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")) < 1e-9


def test_backward_runs_once() -> None:
    x, weight, bias, targets = inputs(5, 3, 4)
    loss = head_loss(x, weight, bias, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_autocast_multiplies_in_16_bit_and_sums_in_32() -> None:
    x, weight, bias, targets = inputs(300, 16, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(x, weight, bias, targets)
    wanted = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")
    assert found.dtype == torch.float32
    assert found != wanted
    assert abs(found / wanted - 1) < 0.01
    gradients = [torch.autograd.grad(loss, (x, weight, bias)) for loss in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 0.02 * other.abs().max()
