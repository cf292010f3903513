"""dalle: train and run a DALL-E from raw image-caption pairs to scored pictures."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_cli.pipeline import Pipeline

# Operations that Apple's GPUs lack run on the CPU; torch reads this once, when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__version__ = "0.1.0"
__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    """Import ``Pipeline`` when it is first used, since it imports torch."""
    if name == "Pipeline":
        from dalle_cli.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
