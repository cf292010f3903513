"""Judge ranked samples of the shapes world, and draw the contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dalle_cli.config.schema import DataSettings
from dalle_cli.data.images import BadImage, decode_image, eval_crop
from dalle_cli.data.sample_lines import read_sample_lines
from dalle_cli.data.source import BadSample, Source
from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.report.artifacts import Run
from dalle_cli.shapes.accuracy import (
    Accuracy,
    JudgedPool,
    Pool,
    accuracies,
    claim_of,
    group_by_caption,
    group_of,
    judge,
)
from dalle_cli.stores.tokens import ROWS_PER_BLOCK, TokenReader
from dalle_cli.views.contact_sheet import Picture
from dalle_cli.views.sample_sheet import sample_sheet

SHEET_CAPTIONS = 12


@dataclass(frozen=True)
class OracleFigures:
    """Shares of captions drawn right, measured on the pictures, by group of captions."""

    groups: dict[str, Accuracy]
    warnings: list[str]


@dataclass(frozen=True)
class SheetFigures:
    """Captions on the contact sheet."""

    captions: list[str]
    captions_in_all: int
    scorer: str
    with_true_pictures: list[str]


def read_ranked(file: Path) -> list[Pool]:
    """Read lines of ``dalle rerank``, grouped by caption.

    Raises:
        UserError: the file cannot be read, or has no sample.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            ranked = group_by_caption(read_sample_lines(stream, str(file)), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); name a file of lines of dalle rerank") from None
    if not ranked:
        raise UserError(f"{file}: holds no sample; write the output of dalle rerank into it")
    return ranked


def judge_samples(ranked: Sequence[Pool]) -> OracleFigures | None:
    """Measure the samples' accuracy on captions of the shapes world; None if there are no such captions."""
    if not any(claim_of(pool.prompt) for pool in ranked):
        return None
    with progress("report", len(ranked), "captions judged") as bar:
        judged = judge(ranked, bar.advance)
    return OracleFigures(accuracies(judged), _warnings(ranked, judged)) if judged else None


def _warnings(ranked: Sequence[Pool], judged: Sequence[JudgedPool]) -> list[str]:
    warnings = []
    if len(judged) < len(ranked):
        warnings.append(f"{len(ranked) - len(judged)} captions are not of the shapes world and are not judged")
    if not all(item.pool.whole for item in judged):
        warnings.append("these lines hold only the best of each caption; rerank without --top to judge single samples")
    elif len({len(item.right) for item in judged}) > 1:
        warnings.append("captions have pools of different sizes; the best of a caption is the best of its own pool")
    return warnings


def draw_sheet(run: Run, ranked: Sequence[Pool], judged: bool) -> tuple[SheetFigures, Image.Image]:
    """Draw the contact sheet of the chosen captions, with true pictures from the run's data if none is ``judged``."""
    chosen = choose_captions(ranked)
    prompts = [pool.prompt for pool in chosen]
    found: dict[str, Picture] = {}
    if run.tokens is not None and run.source is not None and not judged:
        recipe = run.recipe
        found = true_pictures(prompts, run.tokens, run.source, recipe.image_size, recipe.data)
    scorer = str(ranked[0].lines[0].get("scorer", "CLIP"))
    figures = SheetFigures(prompts, len(ranked), scorer, sorted(found))
    return figures, sample_sheet(chosen, run.recipe.name, found)


def choose_captions(ranked: Sequence[Pool], count: int = SHEET_CAPTIONS) -> list[Pool]:
    """Return the first captions in their order, half with held-out pairs and half without if there are enough.

    The choice ignores quality, so the sheet shows failures as often as they happen.
    """
    held_out = [
        i for i, pool in enumerate(ranked) if (claim := claim_of(pool.prompt)) and group_of(claim) != "seen pairs"
    ]
    others = [i for i in range(len(ranked)) if i not in set(held_out)]
    from_held_out = min(len(held_out), max(count // 2, count - len(others)))
    chosen = sorted(others[: count - from_held_out] + held_out[:from_held_out])
    return [ranked[i] for i in chosen]


def true_pictures(
    prompts: Sequence[str], tokens: TokenReader, source: Source, image_size: int, data: DataSettings
) -> dict[str, Picture]:
    """Return for each prompt the source's picture of the first row of the token store with this caption.

    Rows whose keys differ, because the source has changed since, are left out.
    """
    if "text" not in tokens.parts:
        return {}
    wanted = {_normalized(prompt): prompt for prompt in prompts}
    found: dict[str, Picture] = {}
    rows = min(len(tokens), len(source))
    for start in range(0, rows, ROWS_PER_BLOCK):
        block = range(start, min(start + ROWS_PER_BLOCK, rows))
        for row, caption in zip(block, tokens.strings("caption", block), strict=True):
            prompt = wanted.get(_normalized(caption))
            if prompt is None or prompt in found or tokens.strings("key", [row]) != [source.key(row)]:
                continue
            try:
                found[prompt] = eval_crop(decode_image(source.image_bytes(row), data.max_pixels), image_size, data.fit)
            except (BadSample, BadImage):
                continue
        if len(found) == len(wanted):
            break
    return found


def _normalized(caption: str) -> str:
    return " ".join(caption.lower().split())
