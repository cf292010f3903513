"""16-bit floating-point formats, encoded and decoded exactly by integer operations on 32-bit floats.

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

_FLOAT_MANTISSA, _FLOAT_BIAS = 23, 127
_NOISE_BITS = 30


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

        Args:
            values: of any shape. Values above the largest number, infinities and NaN become the largest number (with
                the value's sign). Values below half the smallest subnormal become zero, as do negative values if the
                format has no sign.
            noise: uniform random int32 >= 0 for each value. A value between two neighbouring numbers of the format is
                rounded up with probability (value - lower) / (upper - lower), to within 2^-30, so that the expected
                result is the value itself. Without noise, ties go to the even code.
        """
        bits = values.contiguous().view(torch.int32)
        field = (bits >> _FLOAT_MANTISSA) & 0xFF
        significand = (bits & 0x7FFFFF) | ((field > 0).int() << _FLOAT_MANTISSA)
        exponent = field.clamp(min=1) - (_FLOAT_BIAS - self.bias)
        # Bits to drop: those of the longer mantissa, plus one for each power of 2 below the normal numbers.
        dropped = (1 - exponent).clamp_(min=0).add_(_FLOAT_MANTISSA - self.mantissa)
        beyond = (dropped - _NOISE_BITS).clamp_(min=0)
        significand >>= beyond.clamp(max=31)
        dropped -= beyond
        unit = torch.ones_like(dropped) << dropped
        if noise is None:
            significand += (unit >> 1) - 1 + ((significand >> dropped) & 1)
        else:
            significand += noise & (unit - 1)
        # The field is one too low; the leading bit of the significand adds the missing one.
        code = ((exponent - 1).clamp_(min=0) << self.mantissa) + (significand >> dropped)
        code.clamp_(max=self.largest)
        negative = bits < 0
        code = code | (negative.int() << 15) if self.signed else code.masked_fill_(negative, 0)
        return code.to(torch.uint16)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the numbers (float32, exact) that uint16 ``codes`` stand for."""
        code = codes.to(torch.int32)
        magnitude = code & 0x7FFF if self.signed else code
        rebased = (magnitude << (_FLOAT_MANTISSA - self.mantissa)) + ((_FLOAT_BIAS - self.bias) << _FLOAT_MANTISSA)
        subnormal = magnitude.float() * 2.0 ** (1 - self.bias - self.mantissa)
        value = torch.where(magnitude >> self.mantissa > 0, rebased.view(torch.float32), subnormal)
        return torch.where(code > 0x7FFF, -value, value) if self.signed else value


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
