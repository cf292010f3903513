"""The 16-bit formats against exact fractions, code by code."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.precision.formats import MEAN, VARIANCE, Format, round_stochastically

ALL_CODES = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
BIAS = 60
FORMATS = pytest.mark.parametrize(("form", "mantissa"), [(MEAN, 9), (VARIANCE, 10)], ids=["1-6-9", "0-6-10"])


def value_of(code: int, mantissa: int) -> Fraction:
    """Return the number a code stands for by the format's definition; the sign is bit 15 if the mantissa has 9 bits."""
    magnitude = code % 2**15 if mantissa == 9 else code
    field, fraction = divmod(magnitude, 2**mantissa)
    lead, exponent = (1, field - BIAS) if field else (0, 1 - BIAS)
    size = Fraction(2) ** exponent * (lead + Fraction(fraction, 2**mantissa))
    return -size if code != magnitude else size


def nearest_code(x: float, mantissa: int) -> int:
    """Return the code of the nearest magnitude, ties to even, saturating."""
    size, magnitudes = abs(Fraction(x)), 2 ** (6 + mantissa)
    low, high = 0, magnitudes - 1
    while high - low > 1:  # magnitudes ascend with their codes
        middle = (low + high) // 2
        low, high = (middle, high) if value_of(middle, mantissa) <= size else (low, middle)
    if value_of(high, mantissa) <= size:
        return high
    below, above = size - value_of(low, mantissa), value_of(high, mantissa) - size
    return low if below < above or (below == above and low % 2 == 0) else high


def encoded(form: Format, *values: float) -> list[int]:
    return form.encode(torch.tensor(values, dtype=torch.float32)).tolist()


@FORMATS
def test_every_code_stands_for_its_number_and_comes_back(form: Format, mantissa: int) -> None:
    numbers = form.decode(ALL_CODES)
    assert numbers.isfinite().all()
    assert [Fraction(x) for x in numbers.tolist()] == [value_of(code, mantissa) for code in range(65536)]
    noise = torch.empty(65536, dtype=torch.int32).random_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(form.encode(numbers), ALL_CODES)
    assert torch.equal(form.encode(numbers, noise), ALL_CODES)  # what fits needs no rounding


def test_range() -> None:
    assert VARIANCE.decode(ALL_CODES).max() == 16 - 2**-7
    assert MEAN.decode(ALL_CODES).max() == 16 - 2**-6  # the paper: slightly less than 16
    assert VARIANCE.decode(torch.tensor([1], dtype=torch.uint16)).item() == 2.0**-69
    assert MEAN.decode(torch.tensor([1], dtype=torch.uint16)).item() == 2.0**-68


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
in_range = st.builds(lambda m, e: float(np.float32(m * 2.0**e)), st.floats(-2, 2, width=32), st.integers(-75, 5))


@FORMATS
@settings(max_examples=300)
@given(x=floats | in_range)
def test_the_nearest_code(form: Format, mantissa: int, x: float) -> None:
    code = nearest_code(x, mantissa)
    if mantissa == 9:
        code += 2**15 * (math.copysign(1, x) < 0)
    elif x < 0:
        code = 0
    assert encoded(form, x) == [code]


@FORMATS
def test_the_even_one_of_two_as_near(form: Format, mantissa: int) -> None:
    for code in (0, 1, 2, 511, 2**mantissa - 1, 2**mantissa, 20000, 20001):
        middle = (value_of(code, mantissa) + value_of(code + 1, mantissa)) / 2
        assert Fraction(float(middle)) == middle
        assert encoded(form, float(middle)) == [code + code % 2]


def test_what_has_no_code() -> None:
    inf, nan = math.inf, math.nan
    assert encoded(MEAN, inf, -inf, nan, 1e30, -1e30) == [0x7FFF, 0xFFFF, 0x7FFF, 0x7FFF, 0xFFFF]
    assert encoded(VARIANCE, inf, -inf, nan, 1e30, -1e30, -0.0) == [0xFFFF, 0, 0xFFFF, 0xFFFF, 0, 0]
    assert encoded(MEAN, 0.0, -0.0, 2.0**-70, 1e-45) == [0, 0x8000, 0, 0]


@FORMATS
def test_stochastic_rounding_is_right_on_average(form: Format, mantissa: int) -> None:
    """A value is rounded up as often as it is close to the upper number, for normals, subnormals and below."""
    n = 200_000
    generator = torch.Generator().manual_seed(1)
    for code, part in ((30000, 0.25), (2**mantissa - 1, 0.7), (5, 0.5), (0, 0.1), (0, 0.003)):
        low, high = float(value_of(code, mantissa)), float(value_of(code + 1, mantissa))
        x = torch.full((n,), low + part * (high - low))
        exact = (x[0].item() - low) / (high - low)
        codes = form.encode(x, torch.empty(n, dtype=torch.int32).random_(generator=generator)).int()
        assert set(codes.tolist()) <= {code, code + 1}
        assert abs((codes == code + 1).double().mean().item() - exact) < 4 * math.sqrt(exact * (1 - exact) / n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_are_rounded_to_a_neighbour(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(100_000, generator=generator) * torch.randn(100_000, generator=generator).mul(6).exp2()
    noise = torch.empty(len(x), dtype=torch.int32).random_(generator=generator)
    exact = x.to(dtype)
    assert torch.equal(round_stochastically(exact.float(), dtype, noise), exact)
    rounded = round_stochastically(x, dtype, noise)
    lower = torch.where(exact.float() > x, torch.nextafter(exact, torch.tensor(-math.inf, dtype=dtype)), exact)
    upper = torch.nextafter(lower, torch.tensor(math.inf, dtype=dtype))
    assert ((rounded == lower) | ((rounded == upper) & (lower.float() != x))).all()
    assert 0.45 < (rounded == upper)[lower.float() != x].float().mean() < 0.55
    special = round_stochastically(torch.tensor([math.inf, -math.inf, math.nan, 3.4e38]), dtype, noise[:4])
    assert special[:2].tolist() == [math.inf, -math.inf]
    assert special[2].isnan()
    assert special[3] == torch.finfo(dtype).max
