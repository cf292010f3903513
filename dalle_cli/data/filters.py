"""Which captions and pictures are worth training on, as far as a look at each alone can tell.

After the paper (Ramesh et al. 2021, appendix C) and Conceptual Captions (Sharma et al. 2018, section 3), less what
needs a trained model: language, parts of speech, named entities, adult pictures, what the picture shows.
A filter's name says what it measures and whether its setting is the least or the most that passes.
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
"""What says where a picture is from or how it is sold, not what it shows. Matched without regard to case."""

T = TypeVar("T")

_WORD = re.compile(r"\w+")
_LOOKED_AT = 2000
"""Characters of a caption that boilerplate is looked for in: the patterns' time may grow with the square of them."""


def _words(caption: str) -> list[str]:
    return _WORD.findall(caption.casefold())


def _word_run(caption: str, _: Filters) -> float:
    return max((sum(1 for _ in same) for _, same in groupby(_words(caption))), default=0)


def _unique_words(caption: str, _: Filters) -> float:
    words = _words(caption)
    return len(set(words)) / len(words) if words else 1.0


def _upper_case(caption: str, _: Filters) -> float:
    cased = [character for character in caption if character.isupper() or character.islower()]
    return sum(character.isupper() for character in cased) / len(cased) if cased else 0.0


def _ascii_letters(caption: str, _: Filters) -> float:
    letters = [character for character in caption if character.isalpha()]
    return sum(character.isascii() for character in letters) / len(letters) if letters else 1.0


def _boilerplate(caption: str, filters: Filters) -> float:
    caption = " ".join(caption.split())[:_LOOKED_AT]
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
    # Averaged over small squares first: sensor noise does not make a black frame a picture.
    small = image.resize((64, 64), Image.Resampling.BOX, reducing_gap=2.0)
    return float(np.asarray(small.convert("L"), dtype=np.float32).std())


CAPTION_MEASURES: dict[str, Callable[[str, Filters], float]] = {
    "min_words": lambda caption, _: len(caption.split()),
    "max_words": lambda caption, _: len(caption.split()),
    "min_characters": lambda caption, _: len(caption),
    "max_characters": lambda caption, _: len(caption),
    "max_word_run": _word_run,
    "min_unique_words": _unique_words,
    "max_upper_case": _upper_case,
    "max_boilerplate": _boilerplate,
    "min_ascii_letters": _ascii_letters,
}
PICTURE_MEASURES: dict[str, Callable[[Image.Image, Filters], float]] = {
    "max_aspect_ratio": lambda image, _: max(image.size) / min(image.size),
    "min_side": lambda image, _: min(image.size),
    "min_contrast": _contrast,
}


def filter_captions(captions: list[str], filters: Filters) -> tuple[list[str], str | None]:
    """The captions that pass every caption filter, and why the first was refused if none passes."""
    refusals = [next(failed_caption_filters(caption, filters), None) for caption in captions]
    kept = [caption for caption, refusal in zip(captions, refusals, strict=True) if refusal is None]
    return kept, None if kept else next((_reason(name) for name in refusals if name is not None), "no caption")


def picture_rejection(image: Image.Image, filters: Filters) -> str | None:
    """Why a picture at its own size is left out; None if it passes every picture filter."""
    return next((_reason(name) for name in failed_picture_filters(image, filters)), None)


def failed_caption_filters(caption: str, filters: Filters) -> Iterator[str]:
    """Names of the filters that refuse ``caption``, in their order in the recipe."""
    return _refusals(CAPTION_MEASURES, caption, filters)


def failed_picture_filters(image: Image.Image, filters: Filters) -> Iterator[str]:
    """Names of the filters that refuse ``image``, in their order in the recipe."""
    return _refusals(PICTURE_MEASURES, image, filters)


def caption_identity(filters: Filters) -> dict[str, Any] | None:
    """The caption filters that are on, for a token store's identity; None if all are off."""
    on = _on(CAPTION_MEASURES, filters)
    return on | ({"boilerplate": filters.boilerplate} if "max_boilerplate" in on else {}) or None


def picture_identity(filters: Filters) -> dict[str, Any] | None:
    """The picture filters that are on, for a token store's identity; None if all are off."""
    return _on(PICTURE_MEASURES, filters) or None


def with_typical_limits(filters: Filters, image_size: int) -> Filters:
    """Every filter on: as ``filters`` has it, or else at a value that suits English captions of a web crawl.

    These values are ours, to see what a filter would drop; neither paper gives them.
    """
    values: dict[str, float | None] = {
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
    return filters.model_copy(update={name: value for name, value in values.items() if getattr(filters, name) is None})


def _on(measures: Iterable[str], filters: Filters) -> dict[str, Any]:
    return {name: value for name in measures if (value := getattr(filters, name)) is not None}


def _refusals(measures: Mapping[str, Callable[[T, Filters], float]], sample: T, filters: Filters) -> Iterator[str]:
    for name, limit in _on(measures, filters).items():
        value = measures[name](sample, filters)
        if value < limit if name.startswith("min") else value > limit:
            yield name


def _reason(name: str) -> str:
    """Without the sample's own value, so that a report can count by reason."""
    return f"filtered: {name}"
