"""Gradient scales, one per resblock, for training in 16 bit (paper, section 2.4, appendix D and figure 4).

In the backward pass of a resblock x + branch(x) the gradient of the sum, in 32 bit, is multiplied by the block's scale
and cast to the branch's type. The gradient that leaves the branch at x is filtered, divided by the scale and added to
the gradient of the identity path in 32 bit. The gradients of the block's own parameters therefore come out multiplied
by the scale. They stay so, since many would underflow in 16 bit; the update divides them in 32 bit.

The scales, and what an update skips, are decided on the gradients' device; the host does not wait.
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
from dalle_cli.transfers import send

START, LOWEST, HIGHEST = 13_000, 7_000, 24_000
"""Initial and extreme exponents of a scale, in thousandths of an octave above M: M 2^13, M 2^7 and M 2^24."""
GROWTH, BACKOFF = 1, 500
"""Steps of an exponent, in thousandths: a scale is multiplied by 2^(1/1000) or divided by sqrt(2)."""
WINDOW = 125
"""Minimum number of updates between two divisions of a scale, since overflows often come several in a row."""


def scaled_residual(branch: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor | float) -> Tensor:
    """Return x + branch(x), whose backward pass runs through ``branch`` with gradients multiplied by ``scale``.

    The residual stream ``x`` is float32; ``branch`` returns x's shape, in any type. Non-finite values of the gradient
    that leaves the branch count as zero, so that one block's overflow does not reach the blocks before it. ``scale``,
    a number or a scalar on any device, must stay the same until the backward pass. The function works inside
    ``torch.utils.checkpoint``, and with hooks on parameters.
    """
    return _Join.apply(x, branch(_Fork.apply(x, scale)), scale)  # type: ignore[no-any-return]


class _Fork(torch.autograd.Function):
    """Identity whose backward pass zeroes non-finite gradients and divides by the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).div_(ctx.scale), None


class _Join(torch.autograd.Function):
    """x + update, whose backward pass casts the gradient times the scale to the type of ``update``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, scale: Tensor | float) -> Tensor:
        ctx.scale, ctx.dtype = scale, update.dtype
        return x + update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, (gradient * ctx.scale).to(ctx.dtype), None


class GradientScales:
    """Scales that start at M 2^13, grow while gradients are finite, and shrink when they are not.

    They are stored as whole thousandths of an octave above M, which is exact and lets a run resume with another M. They
    move to the device of the gradients with the first ``update``.

    Args:
        count: number of scales.
        replicas: M, the number of data-parallel replicas.
        window: minimum number of updates between two divisions of the same scale.
    """

    def __init__(self, count: int, replicas: int = 1, window: int = WINDOW) -> None:
        self.replicas, self.window = replicas, window
        self.exponents = torch.full((count,), START)
        self.since_division = torch.full((count,), window)
        # Python's powers, since devices round theirs in other ways.
        self._powers = torch.tensor([2.0 ** (e / 1000) for e in range(LOWEST, HIGHEST + 1)], dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.exponents)

    def values(self) -> Tensor:
        """Return the scales, (count,) float64."""
        return self.replicas * self._powers[self.exponents - LOWEST]

    def update(self, finite: Tensor) -> None:
        """Grow each scale whose gradients were all ``finite``, (count,) bool; shrink the others, once per window."""
        device = finite.device
        exponents, since = send(self.exponents, device), send(self.since_division, device)
        since = (since + 1).clamp(max=self.window)
        shrinks = ~finite & (since == self.window)
        change = GROWTH * finite.long() - BACKOFF * shrinks.long()
        self.exponents = (exponents + change).clamp(LOWEST, HIGHEST)
        self.since_division = since.masked_fill(shrinks, 0)
        self._powers = send(self._powers, device)

    def log2_extremes(self) -> tuple[Tensor, Tensor]:
        """Return log2 of the lowest and the highest scale, scalars in float64."""
        log2 = self.exponents.double() / 1000 + math.log2(self.replicas)
        return log2.min(), log2.max()

    def at_bounds(self) -> Tensor:
        """Return the number of scales at their lowest or highest value, a scalar."""
        return ((self.exponents == LOWEST) | (self.exponents == HIGHEST)).sum()

    def state_dict(self) -> dict[str, list[int]]:
        """Return the state for a checkpoint, as JSON values."""
        return {"exponents": self.exponents.tolist(), "since_division": self.since_division.tolist()}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Restore ``state``, which must have as many scales."""
        if not len(state["exponents"]) == len(state["since_division"]) == len(self):
            raise ValueError(f"the state has {len(state['exponents'])} scales, not {len(self)}")
        self.exponents = torch.tensor(state["exponents"], dtype=torch.long)
        self.since_division = torch.tensor(state["since_division"], dtype=torch.long)


class ScaledBlock(Protocol):
    """A resblock that calls ``scaled_residual`` with its ``gradient_scale``."""

    gradient_scale: Tensor | float | None

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Decision:
    """The gradients that an update uses, and their factors, in float64 on the gradients' device."""

    norm: Tensor
    """Global norm of the used gradients, unscaled, before clipping, a scalar."""
    factors: Tensor
    """Clipping factor over scale, for each scale's gradients and, last, for the unscaled ones; 0 if not used."""


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

    def values(self) -> Tensor:
        """Return the factors that collected gradients have under each scale and, last, 1 for the unscaled ones.

        They are in float64, (len(scales) + 1,).
        """
        scales = self.scales.values() / self.averaged_over
        return torch.cat([scales, scales.new_ones(1)])

    def squares(self, gradients: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Return the sums of squares of the gradients under each scale, (len(scales) + 1,) float64, on their device.

        If some gradients are on a GPU and others in the host's memory, the sums are in the host's memory.
        If gradients are sharded, each rank passes its own shards, as ``gradients`` yields them, and the ranks' results
        are added up, so that all ranks make the same decision. A sum is finite if and only if all its gradients are
        finite (and below 1e19).
        """
        indices, norms = [], []
        for index, gradient in gradients:
            indices.append(index)
            norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        devices = {norm.device for norm in norms}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        sums = torch.zeros(len(self.scales) + 1, dtype=torch.float64, device=device)
        if norms:
            squares = torch.stack([norm.to(device) for norm in norms]).double().square()
            # Not index_add_, which adds in no fixed order on a GPU.
            sums.index_put_((send(torch.tensor(indices), device),), squares, accumulate=True)
        return sums

    def used(self, finite: Tensor) -> Tensor:
        """Return which gradients an update uses: those under each scale and, last, the unscaled ones.

        ``finite`` says, in the same order, whether they all are finite. Both are bool, (len(scales) + 1,).
        """
        return finite & (finite.all() if self.skip == "update" else finite[-1])

    def decide(self, squares: Tensor, clip_norm: float | None) -> Decision:
        """Decide which gradients an update uses, and adjust the scales for the next one.

        ``squares`` are summed over all ranks; ``clip_norm`` is the maximum global norm of the used gradients.
        """
        finite = squares.isfinite()
        used, scales = self.used(finite), send(self.values(), squares.device)
        terms = torch.where(used, squares / scales.square(), 0.0)
        norm = terms.sum().sqrt()
        clip = torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        if len(self.scales):
            self.scales.update(finite[:-1])
            self.assign_scales()
        return Decision(norm, torch.where(used, clip / scales, 0.0))

    def apply(self, optimizer: Adam16, decision: Decision) -> Tensor:
        """Update the parameters of ``optimizer`` and return the share of them that was skipped, a scalar."""
        factors, sizes = decision.factors, [0] * len(decision.factors)
        on_host = factors.device.type == "cpu"
        each: Sequence[Tensor | float] = factors.tolist() if on_host else factors.unbind()
        factor_of: dict[Tensor, Tensor | float] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            index = self.scale_index(parameter)
            factor_of[parameter] = each[index]
            sizes[index] += parameter.numel()
        optimizer.step(factors=factor_of)
        skipped = send(torch.tensor(sizes, dtype=torch.float64), factors.device) * (factors == 0)
        return skipped.sum() / max(sum(sizes), 1)

    def step(self, optimizer: Adam16, clip_norm: float | None, squares: Tensor | None = None) -> dict[str, Tensor]:
        """Make an update from ``squares`` (by default the optimizer's own) and return values to log.

        These are the gradients' norm, the share of the parameters that was skipped and, if there are scales, log2 of
        the lowest and highest and the number at a bound.
        """
        logged: dict[str, Tensor] = {}
        if len(self.scales):
            logged["log2_scale_min"], logged["log2_scale_max"] = self.scales.log2_extremes()
            logged["scales_at_bounds"] = self.scales.at_bounds()
        if squares is None:
            squares = self.squares(self.gradients(p for group in optimizer.param_groups for p in group["params"]))
        decision = self.decide(squares, clip_norm)
        return {"grad_norm": decision.norm, "skipped": self.apply(optimizer, decision), **logged}

    def assign_scales(self) -> None:
        """Set each block's ``gradient_scale`` to its current scale; call it after loading a checkpoint's scales."""
        values = self.scales.values().unbind()
        for block, index in zip(self.blocks, self._scale_of_block, strict=True):
            block.gradient_scale = values[index]
