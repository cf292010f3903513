"""16-bit floating-point formats, exactly encoded and decoded by integer operations on 32-bit floats.

A code's bits are, from the highest: a sign where the format has one, an exponent field e, a mantissa m of M bits. It
stands for 2^(e - bias) (1 + m / 2^M), and for the subnormal 2^(1 - bias) m / 2^M where e = 0; so 0 is zero. The
formats of Adam's moments have neither infinities nor NaN: every code is a number.

The paper (appendix B.2) gives the moments' widths. Their bias follows from its appendix E.2, where the largest 1-6-9
number is "slightly less than 16"; we take the same for 0-6-10. So both reach from 16 down to normal 2^-59, and
subnormals go on to 2^-68 (mean) and 2^-69 (variance), far below what Adam's eps of 1e-8 lets count: eps^2 is 2^-53.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOAT_MANTISSA, _FLOAT_BIAS = 23, 127
_NOISE_BITS = 30


@dataclass(frozen=True)
class Format:
    """A format of 1 sign bit or none, ``exponent`` and ``mantissa`` bits, 16 in all.

    ``largest`` is the code of the largest finite number.
    """

    signed: bool
    exponent: int
    mantissa: int
    bias: int
    largest: int

    def encode(self, values: Tensor, noise: Tensor | None = None) -> Tensor:
        """Nearest codes (uint16) of float32 ``values``, of the same shape; or stochastically rounded ones.

        Args:
            values: what is above the largest number, infinities and NaN among it, becomes the largest number (of
                the value's sign); what is below half the least subnormal becomes zero; without a sign bit, negative
                values become zero.
            noise: uniform random int32 >= 0 for each value: then a value between two neighbouring numbers of the
                format becomes the upper one with a chance that is its distance from the lower one over theirs (to
                2^-30), so that the expected result is the value itself. Without it the nearest is taken, of two as
                near the even one.
        """
        bits = values.contiguous().view(torch.int32)
        field = (bits >> _FLOAT_MANTISSA) & 0xFF
        significand = (bits & 0x7FFFFF) | ((field > 0).int() << _FLOAT_MANTISSA)
        exponent = field.clamp(min=1) - (_FLOAT_BIAS - self.bias)
        # Bits that do not fit: always those of the longer mantissa, and one for each power of 2 below the normals.
        dropped = (1 - exponent).clamp_(min=0).add_(_FLOAT_MANTISSA - self.mantissa)
        beyond = (dropped - _NOISE_BITS).clamp_(min=0)
        significand >>= beyond.clamp(max=31)
        dropped -= beyond
        unit = torch.ones_like(dropped) << dropped
        if noise is None:
            significand += (unit >> 1) - 1 + ((significand >> dropped) & 1)
        else:
            significand += noise & (unit - 1)
        # The significand's leading bit adds the one that the field is short of.
        code = ((exponent - 1).clamp_(min=0) << self.mantissa) + (significand >> dropped)
        code.clamp_(max=self.largest)
        negative = bits < 0
        code = code | (negative.int() << 15) if self.signed else code.masked_fill_(negative, 0)
        return code.to(torch.uint16)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (float32) that uint16 ``codes`` stand for; each is exact."""
        code = codes.to(torch.int32)
        magnitude = code & 0x7FFF if self.signed else code
        rebased = (magnitude << (_FLOAT_MANTISSA - self.mantissa)) + ((_FLOAT_BIAS - self.bias) << _FLOAT_MANTISSA)
        subnormal = magnitude.float() * 2.0 ** (1 - self.bias - self.mantissa)
        value = torch.where(magnitude >> self.mantissa > 0, rebased.view(torch.float32), subnormal)
        return torch.where(code > 0x7FFF, -value, value) if self.signed else value


MEAN = Format(signed=True, exponent=6, mantissa=9, bias=60, largest=0x7FFF)
"""1-6-9, of Adam's running mean."""
VARIANCE = Format(signed=False, exponent=6, mantissa=10, bias=60, largest=0xFFFF)
"""0-6-10, of Adam's running variance."""
_NATIVE = {
    torch.float16: Format(signed=True, exponent=5, mantissa=10, bias=15, largest=0x7BFF),
    torch.bfloat16: Format(signed=True, exponent=8, mantissa=7, bias=127, largest=0x7F7F),
}


def round_stochastically(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """float32 ``values`` in float16 or bfloat16, rounded by ``noise`` as ``Format.encode`` does.

    Finite values beyond the type's largest number become that; infinities and NaN stay what they are.
    """
    rounded = _NATIVE[dtype].encode(values, noise).view(dtype)
    return torch.where(values.isfinite(), rounded, values.to(dtype))
