"""The library for matrix products is chosen by the processor, and chosen without rounding anything."""

from __future__ import annotations

import pytest
import torch

from dalle_cli.distributed import device as matmul
from dalle_cli.distributed.device import fast_matmul

AMD = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}


@pytest.fixture
def _no_setting_left() -> object:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.usefixtures("_no_setting_left")
def test_products_keep_32_bit() -> None:
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = a.double() @ b.double()
    with fast_matmul() as library:
        assert library in ("MKL", "oneDNN")
        assert (a @ b - exact).abs().max() < 1e-6 * 256
        assert (torch.bmm(a[None], b[None])[0] - exact).abs().max() < 1e-6 * 256


@pytest.mark.usefixtures("_no_setting_left")
@pytest.mark.parametrize("other", [{"cpu_name": "Intel Xeon"}, {"avx512_f": False}, {"amx_tile": True}])
def test_other_processors_keep_the_default(monkeypatch: pytest.MonkeyPatch, other: dict[str, object]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD | other)
    with fast_matmul() as library:
        assert library == "MKL"


@pytest.mark.usefixtures("_no_setting_left")
def test_a_product_that_rounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    monkeypatch.setattr(matmul, "_rounds_to_bfloat16", lambda: True)
    with fast_matmul() as library:
        assert library == "MKL"


def test_rounding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not matmul._rounds_to_bfloat16()
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: real(a.bfloat16().float(), b.bfloat16().float()))
    assert matmul._rounds_to_bfloat16()


@pytest.mark.usefixtures("_no_setting_left")
def test_the_setting_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    with pytest.raises(KeyError), fast_matmul():
        raise KeyError
