"""Which language a caption is in, by py3langid, an optional package."""

from __future__ import annotations

from functools import cache
from typing import Any

from dalle_cli.errors import UserError

SURE = 0.5
"""Probability from which a guess counts; of two or three words it is often lower."""


class Detector:
    """Raises UserError if py3langid is not installed."""

    def __init__(self) -> None:
        try:
            _identifier()
        except ImportError:
            raise UserError('--languages needs py3langid: pip install "dalle[languages]"') from None

    def __call__(self, caption: str) -> str:
        """An ISO 639 code, or "unsure"."""
        language, probability = _identifier().classify(caption)
        return str(language) if probability >= SURE else "unsure"


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
