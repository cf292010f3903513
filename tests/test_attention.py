"""Attention against a reference that loops over all pairs of positions, from the words of the patterns."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_cli.prior import attention
from dalle_cli.prior.attention import attend, block_size, blockwise, raster_offsets, window_lags
from dalle_cli.recipes.layout import KINDS, AttentionKind


def may_look(kind: AttentionKind, text: int, grid: int, kernel: int, i: int, j: int) -> bool:
    """Whether stream position i attends to stream position j."""
    if j > i:
        return False
    if j < text:
        return True
    query, key = i - text, j - text
    behind = query - key
    if kind == "row":
        return behind <= grid
    if kind == "column":
        return query % grid == key % grid
    if kind == "conv":
        # Some step of at most k//2 rows up and k//2 columns aside, taken along the raster, leads to the key.
        half = kernel // 2
        steps = ((up, aside) for up in range(half + 1) for aside in range(-half, half + 1))
        return any(up * grid + aside == behind for up, aside in steps)
    return True


def reference(kind: AttentionKind, q: Tensor, k: Tensor, v: Tensor, text: int, grid: int, kernel: int) -> Tensor:
    length = text + grid * grid
    mask = torch.tensor([[may_look(kind, text, grid, kernel, i, j) for j in range(length)] for i in range(length)])
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def random_qkv(text: int, grid: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, text + grid * grid, 3, 2, 4)
    joint = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return [x.detach().requires_grad_() for x in joint.permute(2, 0, 3, 1, 4)]


def assert_same(found: Tensor, wanted: Tensor, inputs: list[Tensor], tolerance: float = 1e-9) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < tolerance
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(grid=st.integers(1, 7), text=st.integers(1, 9), kernel=st.sampled_from([1, 3, 5, 11]))
def test_values_and_gradients(kind: AttentionKind, grid: int, text: int, kernel: int) -> None:
    inputs = random_qkv(text, grid)
    found = attend(kind, *inputs, text, grid, kernel)
    assert_same(found, reference(kind, *inputs, text, grid, kernel), inputs)


@pytest.mark.parametrize("kind", ["row", "conv"])
@settings(max_examples=60, deadline=None)
@given(grid=st.integers(1, 7), text=st.integers(1, 9), kernel=st.sampled_from([1, 3, 5, 11]))
def test_blocks_of_one_row(kind: AttentionKind, grid: int, text: int, kernel: int) -> None:
    """Small images are one block; the windows of larger ones are tried here."""
    inputs = random_qkv(text, grid)
    (text_k, k), (text_v, v) = (x.split([text, grid * grid], dim=2) for x in inputs[1:])
    offsets = raster_offsets(kind, grid, kernel)
    lags = window_lags(grid, grid, offsets)
    found = blockwise(inputs[0][:, :, text:], k, v, text_k, text_v, offsets, grid, lags)
    assert_same(found, reference(kind, *inputs, text, grid, kernel)[:, :, text:], inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "text", "kernel"), [(9, 5, 3), (12, 3, 11)])
def test_larger_images(kind: AttentionKind, grid: int, text: int, kernel: int) -> None:
    if kind == "row":
        assert block_size(grid, raster_offsets(kind, grid, kernel)) == grid
    inputs = random_qkv(text, grid)
    found = attend(kind, *inputs, text, grid, kernel)
    assert_same(found, reference(kind, *inputs, text, grid, kernel), inputs)


def test_paper_windows() -> None:
    assert raster_offsets("row", 32, 11) == tuple(range(33))
    assert raster_offsets("column", 32, 11) == tuple(range(0, 1024, 32))
    conv = raster_offsets("conv", 32, 11)
    assert len(conv) == 5 * 11 + 6 and conv[-1] == 5 * 32 + 5
    assert len(raster_offsets("conv", 3, 11)) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_is_close(kind: AttentionKind) -> None:
    inputs = random_qkv(5, 9, torch.bfloat16)
    found = attend(kind, *inputs, 5, 9, 3)
    assert found.dtype == torch.bfloat16
    wanted = reference(kind, *(x.double() for x in inputs), 5, 9, 3)
    assert (found.double() - wanted).abs().max() < 0.05


def test_softmax_of_16_bit_runs_in_32() -> None:
    scores = torch.zeros(1, 1, 3000, dtype=torch.bfloat16)
    text, local = attention._joint_softmax(scores, scores)
    # A sum in bfloat16 would stall at 256: equal terms below half a unit in the last place are lost.
    assert torch.allclose(torch.cat([text, local], -1).float(), torch.tensor(1 / 6000), rtol=0.01)


def test_inference_then_training() -> None:
    attention._window_bias.cache_clear()
    with torch.inference_mode():
        attend("row", *random_qkv(2, 4), 2, 4, 3)
    inputs = random_qkv(2, 4)
    attend("row", *inputs, 2, 4, 3).sum().backward()
    assert inputs[0].grad is not None


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.seen.add(tuple(x.shape))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_quadratic_in_the_stream(kind: AttentionKind) -> None:
    text, grid, kernel = 7, 9, 3
    stream, image = text + grid * grid, grid * grid
    attention._window_bias.cache_clear()
    with Shapes() as shapes:
        attend(kind, *random_qkv(text, grid), text, grid, kernel).sum().backward()
    large = {(stream, stream), (image, image), (image, stream), (stream, image)}
    assert shapes.seen
    assert not [shape for shape in shapes.seen for pair in pairwise(shape) if pair in large]


def test_wrong_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="17 positions"):
        attend("row", *random_qkv(1, 4), 2, 4, 3)
