"""Tests of attention by blocks against the dense reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers.attention_reference import assert_same, random_qkv, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_cli.config.layout import KINDS, AttentionKind
from dalle_cli.prior import attention
from dalle_cli.prior.attention import (
    Pattern,
    SparseAttention,
    Weights,
    Windows,
    attend,
    raster_offsets,
    window_bias,
    windows_of,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(
    grid=st.integers(1, 9), text=st.integers(1, 9), kernel=st.sampled_from([1, 3, 5, 11]), batch=st.sampled_from([1, 3])
)
def test_values_and_gradients(kind: AttentionKind, grid: int, text: int, kernel: int, batch: int) -> None:
    qkv = random_qkv(text, grid, batch)
    assert_same(attend(kind, qkv, text, grid, kernel), reference(kind, qkv, text, grid, kernel), qkv)


@pytest.mark.parametrize("kind", ["row", "conv"])
@settings(max_examples=60)
@given(st.data())
def test_blocks_of_any_number_of_rows_give_the_same(kind: AttentionKind, data: st.DataObject) -> None:
    grid, text, kernel = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 3]))
    rows = data.draw(st.sampled_from([r for r in range(1, grid + 1) if grid % r == 0]))
    offsets = raster_offsets(kind, grid, kernel)
    above = data.draw(st.integers(min(-(-offsets[-1] // grid), grid - rows), grid - rows))
    qkv = random_qkv(text, grid)
    pattern = Pattern(text, Windows(grid, rows, above, offsets), by_column=False)
    assert_same(SparseAttention.apply(qkv, pattern), reference(kind, qkv, text, grid, kernel), qkv)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "text", "kernel"), [(9, 5, 3), (12, 1, 11), (12, 16, 5), (20, 16, 11)])
@pytest.mark.parametrize("chunk", [1, 5000, attention.CHUNK])
def test_larger_images(
    monkeypatch: pytest.MonkeyPatch, kind: AttentionKind, grid: int, text: int, kernel: int, chunk: int
) -> None:
    monkeypatch.setattr(attention, "CHUNK", chunk)
    qkv = random_qkv(text, grid, batch=3)
    assert_same(attend(kind, qkv, text, grid, kernel), reference(kind, qkv, text, grid, kernel), qkv)


@settings(max_examples=100)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 400), st.integers(1, 3))
def test_chunks_of_any_size_give_the_same(batch: int, heads: int, chunk: int, text: int) -> None:
    qkv = random_qkv(text, 4, batch, heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CHUNK", chunk * 16)
        found = attend("row", qkv, text, 4, 3)
        assert_same(found, reference("row", qkv, text, 4, 3), qkv)


def test_windows_of_the_paper() -> None:
    assert raster_offsets("row", 32, 11) == tuple(range(33))
    assert raster_offsets("column", 32, 11) == tuple(range(0, 1024, 32))
    conv = raster_offsets("conv", 32, 11)
    assert len(conv) == 5 * 11 + 6
    assert conv[-1] == 5 * 32 + 5
    assert len(raster_offsets("conv", 3, 11)) == 9
    row, column, conv_windows = (windows_of(kind, 32, 11) for kind in ("row", "column", "conv"))
    assert (row.blocks, row.queries, row.keys) == (32, 32, 64)
    assert (column.blocks, column.queries, column.keys) == (32, 32, 32)
    assert (conv_windows.blocks, conv_windows.queries, conv_windows.keys) == (16, 64, 256)


def test_description_of_attention() -> None:
    assert attention.describe_attention("row", 256, 32, 11) == (
        "blocks of 32 queries x (256 text + 64 image); flex_attention on a GPU"
    )
    assert attention.describe_attention("full", 256, 32, 11) == "dense, by scaled_dot_product_attention"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_close(kind: AttentionKind, dtype: torch.dtype) -> None:
    qkv = random_qkv(5, 9, dtype=dtype)
    exact = qkv.detach().double().requires_grad_()
    found, wanted = attend(kind, qkv, 5, 9, 3), reference(kind, exact, 5, 9, 3)
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() < 0.05
    gradients = [
        torch.autograd.grad(y.double().square().sum(), x)[0].double() for y, x in ((found, qkv), (wanted, exact))
    ]
    assert (gradients[0] - gradients[1]).abs().max() < 0.03 * gradients[1].abs().max()


def test_softmax_of_16_bit_runs_in_32() -> None:
    text = 3000
    pattern = Pattern(text, windows_of("row", 1, 3), by_column=False)
    zeros = Weights(torch.zeros(1, text + 1, text, dtype=torch.bfloat16), torch.zeros(1, 1, 1, dtype=torch.bfloat16))
    weights = pattern.softmax_(zeros)
    # A sum of ones in bfloat16 would stall at 256, where adding one more is rounded away.
    assert torch.allclose(weights.text[:, -2:].float(), torch.tensor(1 / text), rtol=0.01)
    assert torch.allclose(weights.window.float(), torch.tensor(1 / (text + 1)), rtol=0.01)


def test_inference_then_training() -> None:
    window_bias.cache_clear()
    attention.causal_bias.cache_clear()
    with torch.inference_mode():
        attend("row", random_qkv(2, 4).detach(), 2, 4, 3)
    qkv = random_qkv(2, 4)
    attend("row", qkv, 2, 4, 3).sum().backward()
    assert qkv.grad is not None


class Shapes(TorchDispatchMode):
    """A recorder of the shape of every tensor that an operation returns."""

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
    text, grid, kernel = 7, 17 if kind == "full" else 9, 3
    stream, image = text + grid * grid, grid * grid
    window_bias.cache_clear()
    with Shapes() as shapes:
        attend(kind, random_qkv(text, grid), text, grid, kernel).sum().backward()
    large = {(stream, stream), (image, image), (image, stream), (stream, image)}
    assert shapes.seen
    assert not [shape for shape in shapes.seen for pair in pairwise(shape) if pair in large]


def test_a_stream_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="17 positions"):
        attend("row", random_qkv(1, 4), 2, 4, 3)
