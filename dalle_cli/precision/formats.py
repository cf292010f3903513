"""16-bit floating-point formats, encoded and decoded through the bits of 32-bit floats.

From the highest bit down, a code has a sign if the format has one, an exponent field e and a mantissa m of M bits. It
stands for 2^(e - bias) (1 + m / 2^M), or for the subnormal 2^(1 - bias) m / 2^M if e = 0; code 0 is zero. The formats
of Adam's moments have neither infinities nor NaN: every code is a number.

The paper (appendix B.2) gives the widths of the moments' formats. Their bias follows from its appendix E.2, where the
largest 1-6-9 number is "slightly less than 16"; 0-6-10 has the same bias here. Both formats reach from 16 down to
normal 2^-59 and subnormal 2^-68 (mean) or 2^-69 (variance), far below the smallest values that matter beside Adam's
eps of 1e-8, whose square is 2^-53.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of a recipe's precisions, by their names there."""
_FLOAT_MANTISSA, _FLOAT_BIAS = 23, 127
_INFINITY, _SIGN = 0x7F800000, 0x8000


@dataclass(frozen=True)
class Format:
    """A 16-bit format, with the numbers of its exponent and mantissa bits."""

    signed: bool
    exponent: int
    mantissa: int
    bias: int
    largest: int
    """Code of the largest finite number."""

    def encode(self, values: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the codes (uint16) of float32 ``values``, rounded to nearest or, with ``noise``, stochastically.

        A power of 2 first brings a value to the float32 whose exponent field is the format's, so that the code is that
        float's highest bits, of subnormal numbers too.

        Args:
            values: of any shape. Values above the largest number, infinities and NaN become the largest number (with
                the value's sign). Values below half the smallest subnormal become zero, as do negative values if the
                format has no sign.
            noise: uniform random int32 >= 0 for each value. A value between two neighbouring numbers of the format is
                rounded up with probability (value - lower) / (upper - lower), exactly for normal numbers and to within
                2^-13 for subnormal ones, so that the expected result is the value itself. Without noise, ties go to
                the even code.
        """
        size = values.abs() if self.signed else values.clamp(min=0).abs_()  # a NaN loses its sign
        bits = (size * 2.0 ** (self.bias - _FLOAT_BIAS)).contiguous().view(torch.int32)
        bits.clamp_(max=_INFINITY)  # NaN counts as infinity
        if noise is None:
            bits += ((bits >> self._dropped) & 1) + ((1 << (self._dropped - 1)) - 1)
        else:
            bits += noise & ((1 << self._dropped) - 1)
        code = (bits >> self._dropped).clamp_(max=self.largest)
        if noise is None:
            # The float of a subnormal number was already rounded, and to round twice may miss the nearest.
            units = size.mul_(2.0 ** (self.bias - 1 + self.mantissa)).round_()
            code = torch.where(units < 2**self.mantissa, units.to(torch.int32), code)
        if self.signed:
            code |= values.contiguous().view(torch.int32).bitwise_right_shift(16).bitwise_and_(_SIGN)
        return code.to(torch.uint16)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the numbers (float32, exact) that uint16 ``codes`` stand for."""
        bits = codes.to(torch.int32)
        sign = (bits & _SIGN).bitwise_left_shift_(16) if self.signed else 0
        if self.signed:
            bits &= ~_SIGN
        bits <<= self._dropped
        bits |= sign
        return bits.view(torch.float32).mul_(2.0 ** (_FLOAT_BIAS - self.bias))

    @property
    def _dropped(self) -> int:
        """Number of bits by which float32's mantissa is longer."""
        return _FLOAT_MANTISSA - self.mantissa


MEAN = Format(signed=True, exponent=6, mantissa=9, bias=60, largest=0x7FFF)
"""The format 1-6-9 of Adam's running mean."""
VARIANCE = Format(signed=False, exponent=6, mantissa=10, bias=60, largest=0xFFFF)
"""The format 0-6-10 of Adam's running variance."""
MOMENTS = {"exp_avg": MEAN, "exp_avg_sq": VARIANCE}
"""The formats of Adam's 16-bit moments, by their names in the optimizer's state."""
_NATIVE = {
    torch.float16: Format(signed=True, exponent=5, mantissa=10, bias=15, largest=0x7BFF),
    torch.bfloat16: Format(signed=True, exponent=8, mantissa=7, bias=127, largest=0x7F7F),
}


def round_stochastically(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 ``values`` to float16 or bfloat16 with ``noise``, as ``Format.encode`` does.

    Finite values beyond the type's largest number become that number; infinities and NaN are kept.
    """
    rounded = _NATIVE[dtype].encode(values, noise).view(dtype)
    return torch.where(values.isfinite(), rounded, values.to(dtype))
