"""The best validation of a run, and what its validations warn of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dalle_cli.stores.checkpoint import Checkpoint

RISE = 0.01
"""Relative rise of the held-out loss above its best value that is worth a warning."""


@dataclass
class BestValidation:
    """The lowest held-out loss of the EMA weights so far, and the update after which it was found."""

    step: int = 0
    loss: float = math.inf
    validations_since: int = 0
    by: str = "loss"
    """Name of the validation's loss that is compared; runs of earlier versions name none and compare "loss"."""

    def observe(self, step: int, loss: float) -> None:
        """Record a validation after ``step`` updates."""
        if loss < self.loss:
            self.step, self.loss, self.validations_since = step, loss, 0
        else:
            self.validations_since += 1

    def exhausts(self, patience: int | None) -> bool:
        """Return whether ``patience`` validations have passed without a lower loss."""
        return patience is not None and self.step > 0 and self.validations_since >= patience


def validation_warnings(newest: Checkpoint) -> list[str]:
    """Return a sentence for each thing that the validations of a run warn of, given its newest checkpoint."""
    found, best, metrics = [], newest.best, newest.metrics
    if best is not None and metrics.get(best.by, best.loss) > best.loss + RISE * abs(best.loss):
        found.append(
            f"the {best.name} rose from {best.loss:.4g} after {best.step} updates to {metrics[best.by]:.4g} after "
            f"{newest.step}, so the model memorises: lower {newest.kind}.training.updates, set "
            f"{newest.kind}.training.patience, or use more data"
        )
    image, unigram = metrics.get("image", 0.0), metrics.get("image_unigram", math.inf)
    if image > unigram:
        found.append(
            f"the held-out image loss {image:.4g} is above {unigram:.4g}, the loss of guessing image tokens by their "
            "frequencies, so the prior is of no use for new captions: train it for longer, or if the loss rises, a "
            "smaller one, or use more data"
        )
    others = metrics.get("image_other_captions", math.inf)
    if newest.step and image >= others:
        found.append(
            f"the held-out image loss is {image:.4g} with the right captions and {others:.4g} with those of others, so "
            "the prior ignores captions: train it for longer, or check that captions say what pictures show"
        )
    return found
