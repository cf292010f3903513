"""Skinny products by embedding_bag, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile

from dalle_cli.prior import cpu_kernels
from dalle_cli.prior.cpu_kernels import MAX_ROWS, has_embedding_bag, skinny_bmm

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
