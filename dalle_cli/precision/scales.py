"""The scales of the resblocks' gradients, and the rule that moves them (paper, appendix D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
