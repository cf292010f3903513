"""Gradient scaling in an update: which gradients are under which scale, what is skipped, what they are divided by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dalle_cli.precision.adam import Adam16

START, LOWEST, HIGHEST = 13_000, 7_000, 24_000
"""Exponents of a scale at first and at its bounds, in thousandths of an octave: M 2^13, M 2^7 and M 2^24."""
GROWTH, BACKOFF = 1, 500
"""A scale is multiplied by 2^(1/1000), or divided by sqrt(2)."""
WINDOW = 125
"""Updates from one division of a scale to the next one at least: what overflows may do so several times in a row."""


class GradientScales:
    """``count`` scales, all M 2^13 at first, with M = ``replicas`` data-parallel replicas.

    Kept as whole thousandths of an octave above M: they are exact, and a run may go on with another M. Between two
    divisions of the same scale there are ``window`` updates at least.
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
        """Move the scales after an update: ``finite[i]``, whether all gradients under scale i were finite.

        A scale grows where they were, else it shrinks, or stays if it shrank less than a window ago.
        """
        for i, fine in enumerate(finite):
            self.since_division[i] = min(self.since_division[i] + 1, self.window)
            if fine:
                self.exponents[i] = min(self.exponents[i] + GROWTH, HIGHEST)
            elif self.since_division[i] == self.window:
                self.exponents[i] = max(self.exponents[i] - BACKOFF, LOWEST)
                self.since_division[i] = 0

    def at_bounds(self) -> int:
        """How many scales are at their least or largest."""
        return sum(exponent in (LOWEST, HIGHEST) for exponent in self.exponents)

    def state_dict(self) -> dict[str, list[int]]:
        """What a checkpoint keeps, as JSON can."""
        return {"exponents": list(self.exponents), "since_division": list(self.since_division)}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Go back to ``state``. Raises ValueError if it is of another number of scales."""
        if not len(state["exponents"]) == len(state["since_division"]) == len(self):
            raise ValueError(f"state of {len(state['exponents'])} scales, here are {len(self)}")
        self.exponents, self.since_division = list(state["exponents"]), list(state["since_division"])


class ScaledBlock(Protocol):
    """A resblock that runs ``scaled_residual`` with its ``gradient_scale``."""

    gradient_scale: float | None

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Verdict:
    """What becomes of the gradients of an update."""

    norm: float
    """Global norm of the gradients that are used, unscaled, before clipping."""
    factors: list[float | None]
    """What the gradients under each scale are to be multiplied by, and last those under none: the clipping over the
    scale. None where they are not to be used."""


class GradientScaling:
    """The scales of ``blocks`` at work: scale i is that of block i, or the only one is that of all blocks.

    Args:
        blocks: the resblocks whose gradients are scaled. Other parameters of the model need none: they are in 32 bit.
            Without any, only non-finite gradients are skipped and norms clipped, which suits bfloat16.
        scales: as many as blocks, or one.
        skip: what a non-finite gradient in a resblock keeps from being updated: the resblock, or everything. (The
            paper skips the whole update, appendix E.2; with one common scale that is a must.) One outside the
            resblocks, which no scale would mend, keeps everything from it.
    """

    def __init__(
        self, blocks: Sequence[ScaledBlock], scales: GradientScales, skip: Literal["resblock", "update"] = "resblock"
    ) -> None:
        if len(scales) not in (1, len(blocks)):
            raise ValueError(f"{len(scales)} scales for {len(blocks)} resblocks; give one, or one for each")
        self.blocks, self.scales, self.skip = blocks, scales, skip
        self._own = [i if len(scales) == len(blocks) else 0 for i in range(len(blocks))]
        self._scale_of: dict[Tensor, int] = {
            p: own for own, block in zip(self._own, blocks, strict=True) for p in block.parameters()
        }
        self.hand_out()

    def scale_index(self, parameter: Tensor) -> int:
        """Which scale the gradient of ``parameter`` is under; ``len(scales)`` for none."""
        return self._scale_of.get(parameter, len(self.scales))

    def held(self, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[int, Tensor]]:
        """The gradients of ``parameters`` that have one, each with the index of its scale."""
        return ((self.scale_index(p), p.grad) for p in parameters if p.grad is not None)

    def values(self) -> list[float]:
        """The scales as they are, and last the 1 of gradients under none."""
        return [*(self.scales[i] for i in range(len(self.scales))), 1.0]

    def squares(self, gradients: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Sums of squares of ``gradients``, each given with the index of its scale: (len(scales) + 1,) float64.

        Where gradients are sharded, each process gives its own parts, and the processes' results are to be summed:
        then all come to the same verdict. A sum is finite if and only if all its gradients are (and below 1e19).
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

    def judge(self, squares: Tensor, clip_norm: float | None) -> Verdict:
        """Settle an update from its gradients' ``squares``, and move the scales for the next one.

        The gradients' global norm, of those that are used, is clipped at ``clip_norm``.
        """
        used = squares.isfinite().tolist()
        finite = used[:-1]
        if not used[-1] or (self.skip == "update" and not all(used)):
            used = [False] * len(used)
        scales = self.values()
        terms = zip(squares.tolist(), scales, used, strict=True)
        norm = math.sqrt(sum(square / scale**2 for square, scale, use in terms if use))
        clip = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        self.scales.update(finite)
        self.hand_out()
        return Verdict(norm, [clip / scale if use else None for scale, use in zip(scales, used, strict=True)])

    def apply(self, optimizer: Adam16, verdict: Verdict) -> float:
        """Update the parameters of ``optimizer`` by the gradients they hold. Returns the share that was skipped."""
        factors: dict[Tensor, float] = {}
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for parameter in held:
            factor = verdict.factors[self.scale_index(parameter)]
            if factor is None:
                parameter.grad = None
            else:
                factors[parameter] = factor
        optimizer.step(factors=factors)
        total, used = (sum(p.numel() for p in parameters) for parameters in (held, factors))
        return 1 - used / total if total else 0.0

    def step(self, optimizer: Adam16, clip_norm: float | None, squares: Tensor | None = None) -> dict[str, float]:
        """An update from the gradients that parameters hold: squares, judge and apply.

        Args:
            optimizer: of the parameters, or of this process's parts of them.
            clip_norm: see ``judge``.
            squares: of the gradients, where parts of them are elsewhere; by default those at hand.

        Returns:
            To be logged: the gradients' norm, the share of the parameters that was skipped, and where there are
            scales, log2 of the least and largest and how many are at a bound.
        """
        found: dict[str, float] = {}
        if scales := [self.scales[i] for i in range(len(self.scales))]:
            found["log2_scale_min"], found["log2_scale_max"] = math.log2(min(scales)), math.log2(max(scales))
            found["scales_at_bounds"] = float(self.scales.at_bounds())
        if squares is None:
            squares = self.squares(self.held(p for group in optimizer.param_groups for p in group["params"]))
        verdict = self.judge(squares, clip_norm)
        return {"grad_norm": verdict.norm, "skipped": self.apply(optimizer, verdict), **found}

    def hand_out(self) -> None:
        """Give the blocks the scales as they are now; to be called once a checkpoint's are loaded."""
        for block, index in zip(self.blocks, self._own, strict=True):
            block.gradient_scale = self.scales[index]
