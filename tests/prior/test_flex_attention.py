"""Tests of attention by flex_attention: its masks pair by pair, and its values and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.attention_reference import assert_same, may_look, random_qkv, reference
from helpers.flex import allow_backward_on_cpu
from torch.nn.attention.flex_attention import create_mask

from dalle_cli.config.layout import KINDS, AttentionKind
from dalle_cli.prior.flex_attention import FlexAttention, attends_to

CPU = torch.device("cpu")
SIZES = [(1, 1, 1), (3, 9, 5), (1, 4, 3), (7, 5, 11), (16, 12, 11)]
"""Text positions, sides of the grid and of the convolution's window; odd ones and even ones."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "grid", "kernel"), SIZES)
def test_masks_follow_the_definition(kind: AttentionKind, text: int, grid: int, kernel: int) -> None:
    length = text + grid * grid
    found = create_mask(attends_to(kind, text, grid, kernel, CPU), None, None, length, length, device="cpu")[0, 0]
    # The place of each position of the stream in the order that the mask is for.
    order = torch.arange(length)
    if kind == "column":
        order[text:] = text + torch.arange(grid * grid).view(grid, grid).T.flatten()
    wanted = [[may_look(kind, text, grid, kernel, i, j) for j in order.tolist()] for i in order.tolist()]
    assert found.tolist() == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "grid", "kernel"), SIZES)
def test_values_and_gradients(
    kind: AttentionKind, text: int, grid: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_backward_on_cpu(monkeypatch)
    qkv = random_qkv(text, grid, batch=2)
    found = FlexAttention(kind, text, grid, kernel, CPU)(qkv)
    assert_same(found, reference(kind, qkv, text, grid, kernel), qkv)


def test_blocks_that_no_query_sees_are_left_out() -> None:
    """Row and column attention see about half of the blocks that full attention sees at the size of the paper."""
    blocks = {kind: int(FlexAttention(kind, 256, 32, 11, CPU).mask.to_dense().sum()) for kind in KINDS}
    assert blocks["full"] == 10 * 11 // 2  # of 128 x 128 positions each
    text = 2 * 8 + 3
    # A block of 128 image positions is 4 rows: a row's keys reach one block back, and a column's lie in its own block.
    assert blocks["row"] == text + 8 + 7
    assert blocks["column"] == text + 8
    assert blocks["row"] < blocks["conv"] < blocks["full"]
