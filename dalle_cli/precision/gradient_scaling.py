"""Gradient scales, one per resblock, for training in 16 bit (paper, section 2.4, appendix D and figure 4).

In the backward pass of a resblock x + branch(x) the gradient of the sum, in 32 bit, is multiplied by the block's scale
and cast to the branch's type. The gradient that leaves the branch at x is filtered, divided by the scale and added to
the gradient of the identity path in 32 bit. The gradients of the block's own parameters therefore come out multiplied
by the scale. They stay so, since many would underflow in 16 bit; the update divides them in 32 bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dalle_cli.precision.adam import Adam16

START, LOWEST, HIGHEST = 13_000, 7_000, 24_000
"""Initial and extreme exponents of a scale, in thousandths of an octave above M: M 2^13, M 2^7 and M 2^24."""
GROWTH, BACKOFF = 1, 500
"""Steps of an exponent, in thousandths: a scale is multiplied by 2^(1/1000) or divided by sqrt(2)."""
WINDOW = 125
"""Minimum number of updates between two divisions of a scale, since overflows often come several in a row."""


def scaled_residual(branch: Callable[[Tensor], Tensor], x: Tensor, scale: float) -> Tensor:
    """Return x + branch(x), whose backward pass runs through ``branch`` with gradients multiplied by ``scale``.

    The residual stream ``x`` is float32; ``branch`` returns x's shape, in any type. Non-finite values of the gradient
    that leaves the branch count as zero, so that one block's overflow does not reach the blocks before it. The function
    works inside ``torch.utils.checkpoint``, with the same ``scale`` in both passes, and with hooks on parameters.
    """
    return _Join.apply(x, branch(_Fork.apply(x, scale)), scale)  # type: ignore[no-any-return]


class _Fork(torch.autograd.Function):
    """Identity whose backward pass zeroes non-finite gradients and divides by the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).div_(ctx.scale), None


class _Join(torch.autograd.Function):
    """x + update, whose backward pass casts the gradient times the scale to the type of ``update``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, update.dtype
        return x + update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, (gradient * ctx.scale).to(ctx.dtype), None


class GradientScales:
    """Scales that start at M 2^13, grow while gradients are finite, and shrink when they are not.

    They are stored as whole thousandths of an octave above M, which is exact and lets a run resume with another M.

    Args:
        count: number of scales.
        replicas: M, the number of data-parallel replicas.
        window: minimum number of updates between two divisions of the same scale.
    """

    def __init__(self, count: int, replicas: int = 1, window: int = WINDOW) -> None:
        self.replicas, self.window = replicas, window
        self.exponents = [START] * count
        self.since_division = [window] * count

    def __len__(self) -> int:
        return len(self.exponents)

    def __getitem__(self, i: int) -> float:
        return float(self.replicas * 2.0 ** (self.exponents[i] / 1000))

    def update(self, finite: Sequence[bool]) -> None:
        """Grow each scale whose gradients were all ``finite``; shrink the others, at most once per window."""
        for i, all_finite in enumerate(finite):
            self.since_division[i] = min(self.since_division[i] + 1, self.window)
            if all_finite:
                self.exponents[i] = min(self.exponents[i] + GROWTH, HIGHEST)
            elif self.since_division[i] == self.window:
                self.exponents[i] = max(self.exponents[i] - BACKOFF, LOWEST)
                self.since_division[i] = 0

    def at_bounds(self) -> int:
        """Return the number of scales at their lowest or highest value."""
        return sum(exponent in (LOWEST, HIGHEST) for exponent in self.exponents)

    def state_dict(self) -> dict[str, list[int]]:
        """Return the state for a checkpoint, as JSON values."""
        return {"exponents": list(self.exponents), "since_division": list(self.since_division)}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Restore ``state``, which must have as many scales."""
        if not len(state["exponents"]) == len(state["since_division"]) == len(self):
            raise ValueError(f"the state has {len(state['exponents'])} scales, not {len(self)}")
        self.exponents, self.since_division = list(state["exponents"]), list(state["since_division"])


class ScaledBlock(Protocol):
    """A resblock that calls ``scaled_residual`` with its ``gradient_scale``."""

    gradient_scale: float | None

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Decision:
    """The gradients that an update uses, and their factors."""

    norm: float
    """Global norm of the used gradients, unscaled, before clipping."""
    factors: list[float | None]
    """Clipping factor over scale, for each scale's gradients and, last, for the unscaled ones; None if not used."""


class GradientScaling:
    """Updates of a model whose resblocks have scaled gradients.

    Args:
        blocks: the resblocks whose gradients are scaled. The model's other parameters are in 32 bit and need no scale.
            Without blocks, non-finite gradients are still skipped and norms clipped, which suits bfloat16.
        scales: one for each block, or one for all.
        averaged_over: number of ranks that the scaled gradients are averaged over in place of summed, which undoes the
            scales' factor M.
        skip: what is not updated if a resblock has a non-finite gradient: everything, as in the paper (appendix E.2)
            and as one common scale requires, or that resblock alone. A non-finite gradient outside the resblocks, which
            no scale can prevent, always skips the whole update.
    """

    def __init__(
        self,
        blocks: Sequence[ScaledBlock],
        scales: GradientScales,
        skip: Literal["update", "resblock"] = "update",
        averaged_over: int = 1,
    ) -> None:
        if len(scales) not in (1, len(blocks)):
            raise ValueError(f"{len(scales)} scales for {len(blocks)} resblocks; give one, or one for each")
        self.blocks, self.scales, self.skip, self.averaged_over = blocks, scales, skip, averaged_over
        self._scale_of_block = [i if len(scales) == len(blocks) else 0 for i in range(len(blocks))]
        self._scale_of: dict[Tensor, int] = {
            p: i for i, block in zip(self._scale_of_block, blocks, strict=True) for p in block.parameters()
        }
        self.assign_scales()

    def scale_index(self, parameter: Tensor) -> int:
        """Return the index of the scale of ``parameter``'s gradient, ``len(scales)`` if it is unscaled."""
        return self._scale_of.get(parameter, len(self.scales))

    def scales_gradient_of(self, parameter: Tensor) -> bool:
        """Return whether the gradient of ``parameter`` is multiplied by a scale."""
        return parameter in self._scale_of

    def gradients(self, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[int, Tensor]]:
        """Yield each parameter's gradient, if it has one, with the index of its scale."""
        return ((self.scale_index(p), p.grad) for p in parameters if p.grad is not None)

    def values(self) -> list[float]:
        """Return the factors that collected gradients have under each scale and, last, 1 for the unscaled ones."""
        return [*(self.scales[i] / self.averaged_over for i in range(len(self.scales))), 1.0]

    def squares(self, gradients: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Return the sums of squares of the gradients under each scale, (len(scales) + 1,) float64.

        If gradients are sharded, each rank passes its own shards, as ``gradients`` yields them, and the ranks' results
        are added up, so that all ranks make the same decision. A sum is finite if and only if all its gradients are
        finite (and below 1e19).
        """
        indices, norms = [], []
        for index, gradient in gradients:
            indices.append(index)
            norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        sums = torch.zeros(len(self.scales) + 1, dtype=torch.float64)
        if norms:
            stacked = torch.stack([norm.to(norms[0].device) for norm in norms])
            sums.index_add_(0, torch.tensor(indices), stacked.double().cpu().square())
        return sums

    def used(self, finite: Sequence[bool]) -> list[bool]:
        """Return which gradients an update uses: those under each scale and, last, the unscaled ones.

        ``finite`` says, in the same order, whether they all are finite.
        """
        skips_all = not finite[-1] or (self.skip == "update" and not all(finite))
        return [False] * len(finite) if skips_all else list(finite)

    def decide(self, squares: Tensor, clip_norm: float | None) -> Decision:
        """Decide which gradients an update uses, and adjust the scales for the next one.

        ``squares`` are summed over all ranks; ``clip_norm`` is the maximum global norm of the used gradients.
        """
        finite = squares.isfinite().tolist()
        used, scales = self.used(finite), self.values()
        terms = zip(squares.tolist(), scales, used, strict=True)
        norm = math.sqrt(sum(square / scale**2 for square, scale, use in terms if use))
        clip = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        self.scales.update(finite[:-1])
        self.assign_scales()
        return Decision(norm, [clip / scale if use else None for scale, use in zip(scales, used, strict=True)])

    def apply(self, optimizer: Adam16, decision: Decision) -> float:
        """Update the parameters of ``optimizer`` and return the share of them that was skipped."""
        factors: dict[Tensor, float] = {}
        with_gradient = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for parameter in with_gradient:
            factor = decision.factors[self.scale_index(parameter)]
            if factor is None:
                parameter.grad = None
            else:
                factors[parameter] = factor
        optimizer.step(factors=factors)
        total, used = (sum(p.numel() for p in parameters) for parameters in (with_gradient, factors))
        return 1 - used / total if total else 0.0

    def step(self, optimizer: Adam16, clip_norm: float | None, squares: Tensor | None = None) -> dict[str, float]:
        """Make an update from ``squares`` (by default the optimizer's own) and return values to log.

        These are the gradients' norm, the share of the parameters that was skipped and, if there are scales, log2 of
        the lowest and highest and the number at a bound.
        """
        logged: dict[str, float] = {}
        if scales := [self.scales[i] for i in range(len(self.scales))]:
            logged["log2_scale_min"], logged["log2_scale_max"] = math.log2(min(scales)), math.log2(max(scales))
            logged["scales_at_bounds"] = float(self.scales.at_bounds())
        if squares is None:
            squares = self.squares(self.gradients(p for group in optimizer.param_groups for p in group["params"]))
        decision = self.decide(squares, clip_norm)
        return {"grad_norm": decision.norm, "skipped": self.apply(optimizer, decision), **logged}

    def assign_scales(self) -> None:
        """Set each block's ``gradient_scale`` to its current scale; call it after loading a checkpoint's scales."""
        for block, index in zip(self.blocks, self._scale_of_block, strict=True):
            block.gradient_scale = self.scales[index]
