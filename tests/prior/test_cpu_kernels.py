"""Products of few rows by bags of embeddings, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile

from dalle_cli.prior import cpu_kernels as thin
from dalle_cli.prior.cpu_kernels import FEW, has_bags, thin_bmm

DTYPES = [torch.float32, torch.bfloat16]
BAG = "aten::_embedding_bag_forward_only"


@pytest.fixture(params=[True, False], ids=["bags", "products"])
def by_bags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        if not has_bags(torch.device("cpu")):
            pytest.skip("bags of embeddings are not compiled for this processor")
        monkeypatch.setattr(thin, "LEAST", dict.fromkeys(DTYPES, 0))
    else:
        monkeypatch.setattr(thin, "has_bags", lambda device: False)
    return bool(request.param)


def operators(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
    with torch.inference_mode(), profile() as seen:
        found = thin_bmm(a, b)
    return found, {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("streams", "n", "inner", "width"), [(1, 1, 1, 1), (3, 1, 33, 64), (2, FEW, 7, 5), (5, 2, 64, 9)]
)
def test_it_is_a_product(streams: int, n: int, inner: int, width: int, dtype: torch.dtype, by_bags: bool) -> None:
    generator = torch.Generator().manual_seed(streams)
    a = torch.randn(streams, n, inner, generator=generator).to(dtype)
    whole = torch.randn(streams, inner + 4, width, generator=generator).to(dtype)
    # A matrix that lies whole, one that is cut out of a larger one, and one whose columns lie one behind the other.
    turned = whole[:, :inner].mT.contiguous().mT
    for b in (whole[:, :inner].contiguous(), whole[:, 3 : inner + 3], turned):
        wanted = a.double() @ b.double()
        found, called = operators(a, b)
        assert found.shape == (streams, n, width)
        assert found.dtype == dtype
        # Sums run in 32 bit, and the result is rounded once.
        rounding = inner * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
        assert ((found - wanted).abs() <= rounding * (a.double().abs() @ b.double().abs())).all()
        in_rows = b.stride()[1:] == (width, 1)
        assert (BAG in called) == (by_bags and in_rows)


def test_many_rows_and_small_matrices_are_products() -> None:
    for a, b in (
        (torch.ones(2, FEW + 1, 512), torch.ones(2, 512, 512)),
        (torch.ones(2, 1, 8), torch.ones(2, 8, 8)),
    ):
        found, called = operators(a, b)
        assert (found == a.shape[-1]).all()
        assert BAG not in called
