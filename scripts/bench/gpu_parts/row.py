"""A figure of the check, with the bound that it should meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A measured figure; ``at_least`` or ``at_most`` is its bound, if it has one."""

    what: str
    figure: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """True if the figure meets its bound; None without one."""
        if self.at_least is not None:
            return self.figure >= self.at_least
        return None if self.at_most is None else self.figure <= self.at_most

    def as_json(self) -> dict[str, Any]:
        bound = f">= {self.at_least:g}" if self.at_least is not None else ""
        bound = bound or (f"<= {self.at_most:g}" if self.at_most is not None else "")
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return {"what": self.what, "figure": self.figure, "unit": self.unit, "bound": bound, "met": met}
