"""Filters that leave out captions and pictures which are not worth training on, judged one by one.

They follow the paper (Ramesh et al. 2021, appendix C) and Conceptual Captions (Sharma et al. 2018, section 3), except
for filters that need a trained model: parts of speech, named entities, adult or other content of pictures. The language
is guessed by py3langid, where the paper has cld3.
A filter's name says what it measures and whether its setting is the minimum or the maximum that passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dalle_cli.config.schema import Filters
from dalle_cli.data.language import UNSURE, shared_detector

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"[0-3]?\d(?:st|nd|rd|th)?"
_DATE = "|".join(
    (
        r"\d{4}[-/.:][01]?\d[-/.:][0-3]?\d",
        r"[0-3]?\d[-/.][0-3]?\d[-/.](?:\d{4}|\d{2})",
        rf"{_DAY}(?:\s+of)?\s+{_MONTH}(?:,?\s+\d{{4}})?",
        rf"{_MONTH}\s+{_DAY}(?:,?\s+\d{{4}})?",
        rf"{_MONTH},?\s+\d{{4}}",
    )
)
_PICTURE = r"(?:photo(?:graph)?|picture|image|illustration|vector|footage|clip\s?art)s?"
BOILERPLATE = (
    r"(?:https?://|www\.)\S+",
    r"\b[\w-]+\.(?:com|org|net|info|co\.uk|de|fr)\b(?:/\S*)?",
    r"\b[\w.+-]{1,64}@[\w-]{1,255}\.\w+",
    r"\b[\w-]+\.(?:jpe?g|png|gif|tiff?|webp|bmp|heic|raw|nef|cr2)\b",
    r"\b(?:img|dscn?|dscf|pict?|imgp|mvc|cimg|sam|gopr|pxl)[_-]?\d{3,}\w*",
    r"\b_?[pm]\d{7}\b",
    r"\bscreen\s?shots?(?:\s+(?:from|at))?",
    r"(?:\b(?:photographed|photo(?:graph)?|picture|image|taken|captured|shot|scanned|uploaded|posted|published)\s+)*"
    rf"(?:\b(?:on|in|from|at|by)\s+)?(?:the\s+)?\b(?:{_DATE})\b(?:\s+(?:at\s+)?\d{{1,2}}:\d{{2}}(?::\d{{2}})?(?:\s?[ap]m)?)?",
    r"\b\d{1,2}:\d{2}(?::\d{2})?(?:\s?[ap]m)?\b",
    r"\b\d{2,5}\s?[x×]\s?\d{2,5}(?:\s?px)?\b",
    r"(?<!\w)#?\d{4,}\b",
    rf"\b(?:royalty[\s-]free|rights[\s-]managed)(?:\s+stock)?(?:\s+{_PICTURE})?",
    rf"\bstock\s+{_PICTURE}",
    r"\b(?:all\s+)?rights\s+reserved\b",
    r"(?:©|\(c\)|\bcopyright)\s*(?:\d{4})?",
    rf"\b{_PICTURE}\s+(?:by(?!\s+the\b)|courtesy(?:\s+of)?|credits?|via)\b",
    r"\b(?:getty\s+images|shutterstock|i?stock\s?photo|alamy|depositphotos|dreamstime|adobe\s+stock|flickr)\b",
    r"\bclick\s+(?:here\b(?:\s+(?:to|for)\s+\w+)?|(?:to|for)\s+(?:enlarge|view|zoom|see|(?:a\s+)?larger)\b)"
    rf"(?:\s+(?:the\s+)?(?:{_PICTURE}|view|version)\b)?",
    rf"\b(?:embedded\s+image\s+permalink|{_PICTURE}\s+may\s+contain|no\s+(?:alt(?:ernative)?\s+text|caption|description))\b",
    rf"\b(?:profile|cover|featured|thumbnail|preview|related|header)\s+{_PICTURE}",
    r"\b(?:untitled|thumbnail|image not available|photo not available|file photo)\b",
)
"""Patterns of text about a picture's origin or sale, not its content; case is ignored."""

T = TypeVar("T")

_WORD = re.compile(r"\w+")
_BOILERPLATE_SEARCH_LENGTH = 2000
"""Number of characters of a caption that are searched for boilerplate; the time may grow quadratically with it."""


def _words(caption: str) -> list[str]:
    return _WORD.findall(caption.casefold())


def _longest_word_run(caption: str, _: Filters) -> float:
    return max((sum(1 for _ in same) for _, same in groupby(_words(caption))), default=0)


def _unique_word_share(caption: str, _: Filters) -> float:
    words = _words(caption)
    return len(set(words)) / len(words) if words else 1.0


def _upper_case_share(caption: str, _: Filters) -> float:
    cased = [character for character in caption if character.isupper() or character.islower()]
    return sum(character.isupper() for character in cased) / len(cased) if cased else 0.0


def _ascii_letter_share(caption: str, _: Filters) -> float:
    letters = [character for character in caption if character.isalpha()]
    return sum(character.isascii() for character in letters) / len(letters) if letters else 1.0


def _boilerplate_share(caption: str, filters: Filters) -> float:
    caption = " ".join(caption.split())[:_BOILERPLATE_SEARCH_LENGTH]
    total = sum(character.isalnum() for character in caption)
    covered = sum(
        sum(character.isalnum() for character in match.group())
        for match in _boilerplate_pattern(tuple(filters.boilerplate)).finditer(caption)
    )
    return covered / total if total else 0.0


@lru_cache
def _boilerplate_pattern(more: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in (*more, *BOILERPLATE)), re.IGNORECASE)


def _contrast(image: Image.Image, _: Filters) -> float:
    # Average over small squares first, so that sensor noise does not give a black frame contrast.
    small = image.resize((64, 64), Image.Resampling.BOX, reducing_gap=2.0)
    return float(np.asarray(small.convert("L"), dtype=np.float32).std())


def _language(caption: str, _: Filters) -> str:
    return shared_detector()(caption)


CAPTION_MEASURES: dict[str, Callable[[str, Filters], float | str]] = {
    "min_words": lambda caption, _: len(caption.split()),
    "max_words": lambda caption, _: len(caption.split()),
    "min_characters": lambda caption, _: len(caption),
    "max_characters": lambda caption, _: len(caption),
    "max_word_run": _longest_word_run,
    "min_unique_words": _unique_word_share,
    "max_upper_case": _upper_case_share,
    "max_boilerplate": _boilerplate_share,
    "min_ascii_letters": _ascii_letter_share,
    "language": _language,
}
PICTURE_MEASURES: dict[str, Callable[[Image.Image, Filters], float | str]] = {
    "max_aspect_ratio": lambda image, _: max(image.size) / min(image.size),
    "min_side": lambda image, _: min(image.size),
    "min_contrast": _contrast,
}


def filter_captions(captions: list[str], filters: Filters) -> tuple[list[str], str | None]:
    """Return the captions that pass every caption filter, and why the first was rejected if none passes."""
    rejections = [next(failed_caption_filters(caption, filters), None) for caption in captions]
    passed = [caption for caption, rejection in zip(captions, rejections, strict=True) if rejection is None]
    return passed, None if passed else next((_reason(name) for name in rejections if name is not None), "no caption")


def picture_rejection(image: Image.Image, filters: Filters) -> str | None:
    """Return why a picture (at its full size) is rejected, or None if it passes every picture filter."""
    return next((_reason(name) for name in failed_picture_filters(image, filters)), None)


def failed_caption_filters(caption: str, filters: Filters) -> Iterator[str]:
    """Yield the names of the filters that ``caption`` fails, in their order in the recipe."""
    return _failed_filters(CAPTION_MEASURES, caption, filters)


def failed_picture_filters(image: Image.Image, filters: Filters) -> Iterator[str]:
    """Yield the names of the filters that ``image`` fails, in their order in the recipe."""
    return _failed_filters(PICTURE_MEASURES, image, filters)


def caption_identity(filters: Filters) -> dict[str, Any] | None:
    """Return the caption filters that are on, for a token store's identity; None if all are off."""
    on = _on(CAPTION_MEASURES, filters)
    return on | ({"boilerplate": filters.boilerplate} if "max_boilerplate" in on else {}) or None


def picture_identity(filters: Filters) -> dict[str, Any] | None:
    """Return the picture filters that are on, for a token store's identity; None if all are off."""
    return _on(PICTURE_MEASURES, filters) or None


def with_typical_limits(filters: Filters, image_size: int) -> Filters:
    """Turn on every filter that is off, with a limit that suits English captions of a web crawl.

    These limits are ours, to show what a filter would drop; neither paper gives them.
    """
    limits: dict[str, float | None] = {
        "min_words": 3,
        "max_words": 60,
        "min_characters": 8,
        "max_characters": 400,
        "max_word_run": 2,
        "min_unique_words": 0.5,
        "max_upper_case": 0.5,
        "max_boilerplate": 0.6,
        "min_ascii_letters": 0.9,
        "max_aspect_ratio": 2.0,
        "min_side": image_size,
        "min_contrast": 4.0,
    }
    return filters.model_copy(update={name: limit for name, limit in limits.items() if getattr(filters, name) is None})


def _on(measures: Iterable[str], filters: Filters) -> dict[str, Any]:
    return {name: limit for name in measures if (limit := getattr(filters, name)) is not None}


def _failed_filters(
    measures: Mapping[str, Callable[[T, Filters], float | str]], sample: T, filters: Filters
) -> Iterator[str]:
    for name, limit in _on(measures, filters).items():
        value = measures[name](sample, filters)
        if name == "language":
            failed = value not in (limit, UNSURE)
        else:
            failed = value < limit if name.startswith("min") else value > limit
        if failed:
            yield name


def _reason(name: str) -> str:
    """Return the reason for lists of skipped samples, without the sample's value so that reasons can be counted."""
    return f"filtered: {name}"
