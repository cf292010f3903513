"""Skinny products by embedding_bag, and products with matrices in 8 bits, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile

from dalle_cli.prior import cpu_kernels
from dalle_cli.prior.cpu_kernels import INT8_BLOCK, INT8_ROWS, MAX_ROWS, Int8Linear, has_embedding_bag, skinny_bmm
from dalle_cli.prior.model import Linear

DTYPES = [torch.float32, torch.bfloat16]
BAG = "aten::_embedding_bag_forward_only"


@pytest.fixture(params=[True, False], ids=["embedding_bag", "bmm"])
def by_embedding_bag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        if not has_embedding_bag(torch.device("cpu")):
            pytest.skip("embedding_bag is not compiled for this processor")
        monkeypatch.setattr(cpu_kernels, "MIN_VALUES", dict.fromkeys(DTYPES, 0))
    else:
        monkeypatch.setattr(cpu_kernels, "has_embedding_bag", lambda device: False)
    return bool(request.param)


def operators(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
    with torch.inference_mode(), profile() as seen:
        found = skinny_bmm(a, b)
    return found, {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("streams", "n", "inner", "width"), [(1, 1, 1, 1), (3, 1, 33, 64), (2, MAX_ROWS, 7, 5), (5, 2, 64, 9)]
)
def test_it_is_a_product(
    streams: int, n: int, inner: int, width: int, dtype: torch.dtype, by_embedding_bag: bool
) -> None:
    generator = torch.Generator().manual_seed(streams)
    a = torch.randn(streams, n, inner, generator=generator).to(dtype)
    whole = torch.randn(streams, inner + 4, width, generator=generator).to(dtype)
    # A contiguous matrix, one cut out of a larger one, and one with contiguous columns.
    by_columns = whole[:, :inner].mT.contiguous().mT
    for b in (whole[:, :inner].contiguous(), whole[:, 3 : inner + 3], by_columns):
        wanted = a.double() @ b.double()
        found, called = operators(a, b)
        assert found.shape == (streams, n, width)
        assert found.dtype == dtype
        # Sums run in 32 bit, and the result is rounded once.
        rounding = inner * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
        assert ((found - wanted).abs() <= rounding * (a.double().abs() @ b.double().abs())).all()
        contiguous_rows = b.stride()[1:] == (width, 1)
        assert (BAG in called) == (by_embedding_bag and contiguous_rows)


def test_many_rows_and_small_matrices_are_products() -> None:
    for a, b in (
        (torch.ones(2, MAX_ROWS + 1, 512), torch.ones(2, 512, 512)),
        (torch.ones(2, 1, 8), torch.ones(2, 8, 8)),
    ):
        found, called = operators(a, b)
        assert (found == a.shape[-1]).all()
        assert BAG not in called


def random_linear(inputs: int, outputs: int) -> Linear:
    """Return a layer whose inputs' weights differ in size, as behind the gains of a layer norm."""
    generator = torch.Generator().manual_seed(inputs)
    linear = Linear(inputs, outputs).requires_grad_(False)
    sizes = torch.rand(inputs, generator=generator) + 0.01
    linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) * sizes)
    linear.bias.normal_(generator=generator)
    return linear


def read_blocks(packed: Tensor, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of FBGEMM's 8-bit table in float64, and the scale of each.

    A row is its values in 8 bits, then their scale and least value as floats of 32 bit.
    """
    table = packed.numpy()
    assert table.shape[1] == width + 8
    scale, least = np.ascontiguousarray(table[:, width:]).view("<f4").astype(np.float64).T[..., None]
    return table[:, :width] * scale + least, scale


@pytest.mark.parametrize("outputs", [1, 33, INT8_BLOCK, INT8_BLOCK + 1, 3 * INT8_BLOCK - 5])
@pytest.mark.parametrize("inputs", [1, 7, 64])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("fbgemm", [True, False])
def test_int8_linear_is_the_product_with_its_matrix(
    inputs: int, outputs: int, gelu: bool, fbgemm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fbgemm:
        monkeypatch.setattr(cpu_kernels, "has_embedding_bag", lambda device: False)
    linear = random_linear(inputs, outputs)
    found = Int8Linear(linear, gelu)
    width = -(-outputs // found.blocks)
    rows, scale = read_blocks(found.weight, width)
    blocks = rows.reshape(found.blocks, inputs, width)
    weight = torch.from_numpy(np.concatenate(list(blocks), axis=1)[:, :outputs]).T
    # Each weight is rounded to the nearest of 256 steps between the least and the largest of its block.
    whole = F.pad(linear.weight.T.double(), (0, found.blocks * width - outputs)).unflatten(1, (found.blocks, width))
    steps = (whole.amax(-1) - whole.amin(-1)) / 255
    assert torch.allclose(torch.from_numpy(scale).view(found.blocks, inputs).T, steps, rtol=1e-4, atol=1e-7)
    nearest = (weight.T - linear.weight.T).abs() / steps.repeat_interleave(width, 1)[:, :outputs].clamp(min=1e-6)
    assert nearest.max() < 0.51
    for shape in [(1,), (2, 3), (1, 1), (INT8_ROWS,), (INT8_ROWS + 1,), (2, 40)]:
        x = torch.randn(*shape, inputs, generator=torch.Generator().manual_seed(1))
        wanted = F.linear(x.double(), weight, linear.bias.double())
        y = found(x)
        assert y.dtype == torch.float32
        assert y.shape == (*shape, outputs)
        assert torch.allclose(y.double(), F.gelu(wanted) if gelu else wanted, atol=1e-4)
    assert torch.equal(found(x.bfloat16()), found(x.bfloat16().float()))


def test_int8_matrices_take_a_quarter_of_the_memory() -> None:
    linear = random_linear(512, 1536)
    assert Int8Linear(linear).weight.untyped_storage().nbytes() < 0.26 * linear.weight.untyped_storage().nbytes()
