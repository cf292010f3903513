"""The language of a caption, by the optional package py3langid."""

from __future__ import annotations

from functools import cache

from dalle_cli.errors import UserError

MIN_LANGUAGE_PROBABILITY = 0.5
"""Probability below which a language is UNSURE, which is common for captions of two or three words."""
UNSURE = "unsure"


class LanguageDetector:
    """Guesses the language of a caption by the optional package py3langid.

    Raises:
        UserError: py3langid is not installed.
    """

    def __init__(self) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise UserError(
                'the language of captions needs py3langid: pip install "dalle-toolchain[languages]"'
            ) from None
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def __call__(self, caption: str) -> str:
        """Return an ISO 639 code, or UNSURE."""
        language, probability = self._identifier.classify(caption)
        return str(language) if probability >= MIN_LANGUAGE_PROBABILITY else UNSURE


@cache
def shared_detector() -> LanguageDetector:
    """Return a detector of this process; its model takes a second to load."""
    return LanguageDetector()
