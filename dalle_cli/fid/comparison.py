"""Several systems against one reference: their figures, against the blur's radius and the reranking pool's size.

The talk's evaluations. Every picture is measured once for each radius; pools are reranked again and again from the
scores that they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dalle_cli.errors import UserError
from dalle_cli.fid.features import Extracted, Features, cached_features
from dalle_cli.fid.metrics import FrechetTo, check_counts, compare, inception_score
from dalle_cli.fid.pictures import Pictures, SomePictures, Survey, survey
from dalle_cli.fid.pools import best_of_subsets
from dalle_cli.fid.systems import System, check_same_captions
from dalle_cli.progress import Progress, progress
from dalle_cli.shapes.accuracy import accuracies, accuracy_figures, judge

FORMAT, VERSION = "dalle-eval-fid", 1


@dataclass(frozen=True)
class Settings:
    """How to compare: ``radii`` of the blur, ``pool_sizes`` (none: no reranking), draws of subsets for each size,
    rounds of the bootstrap, and the seed of all that is drawn.
    """

    radii: Sequence[float] = (0.0,)
    pool_sizes: Sequence[int] = ()
    repeats: int = 10
    bootstrap: int = 0
    seed: int = 0


@dataclass(frozen=True)
class _Chosen:
    """A system, the rows its own figures are of, and the rows that reranking takes: (repeats, captions, sizes)."""

    system: System
    rows: NDArray[np.int64]
    subsets: NDArray[np.int64] | None


def compare_systems(
    systems: Sequence[System], reference: Pictures, features: Features, settings: Settings, cache: Path
) -> dict[str, Any]:
    """Figures of every system: ``{"systems": [...], "warnings": [...], ...}``.

    Each of ``systems`` has what :func:`dalle_cli.fid.metrics.compare` finds without blur, and with more radii or
    pool sizes ``blur``, the same for each ``radius``; ``pool``, for each ``size`` the mean and the standard deviation
    (``_error``) over random subsets; and ``accuracy`` of captions of the shapes world. With pool sizes, a system whose
    pictures have scores stands for itself with the best of each caption's whole pool.

    Raises:
        UserError: a picture is missing, broken, or of another size than its system's others; a pool is smaller than
            a size that is asked for; too few pictures; systems of different captions altogether.
    """
    warnings = check_same_captions(systems)
    chosen = [_choose(system, settings) for system in systems]
    if settings.pool_sizes and all(item.subsets is None for item in chosen):
        raise UserError("--pool: no system has scores to rerank by; rerank its samples first: dalle rerank")
    for item in chosen:
        _refuse_missing(item.system)
        check_counts(len(item.rows), len(reference), f"system {item.system.name}")
    radii = sorted({0.0, *settings.radii})
    needed = [_needed(item) for item in chosen]
    looks = len(reference) + sum(len(rows) for rows in needed)
    with progress("eval-fid: looking at files", looks, "pictures") as bar:
        real = survey(reference, bar.advance)
        surveys = [survey(SomePictures(item.system.pictures, rows.tolist()), bar.advance)
                   for item, rows in zip(chosen, needed, strict=True)]  # fmt: skip
    warnings += _enlarged("the reference", real, reference.image_size)
    for item, rows, found in zip(chosen, needed, surveys, strict=True):
        _refuse_other_sizes(item.system, rows, found)
        warnings += _enlarged(item.system.name, found, item.system.pictures.image_size)
    warnings += _counts(chosen)

    results: list[dict[str, Any]] = [{"name": s.name, "generated": s.spec} for s in systems]
    steps = len(radii) * (len(reference) + sum(len(item.rows) for item in chosen)) + sum(
        len(rows) - len(item.rows) for item, rows in zip(chosen, needed, strict=True)
    )
    with progress(f"eval-fid: {features.name.split()[0]} features", steps, "pictures") as bar:
        for radius in radii:
            _at_radius(radius, chosen, needed, surveys, (reference, real), features, settings, cache, bar, results)
    for item, result in zip(chosen, results, strict=True):
        if settings.pool_sizes and (found_accuracy := _accuracy(item.system, settings)):
            result["accuracy"] = found_accuracy
    return {"features": features.name, "systems": results, "warnings": list(dict.fromkeys(warnings))}


def _at_radius(
    radius: float,
    chosen: Sequence[_Chosen],
    needed: Sequence[NDArray[np.int64]],
    surveys: Sequence[Survey],
    real: tuple[Pictures, Survey],
    features: Features,
    settings: Settings,
    cache: Path,
    bar: Progress,
    results: list[dict[str, Any]],
) -> None:
    """Add what is found at this radius to each of ``results``."""
    reference = cached_features(*real, features, cache, blur=radius, bar=bar)
    frechet = FrechetTo(reference.vectors, features.device) if settings.bootstrap or settings.pool_sizes else None
    for item, rows, found, result in zip(chosen, needed, surveys, results, strict=True):
        # Only the unblurred pictures are reranked.
        wanted = rows if radius == 0 else item.rows
        place = {int(row): number for number, row in enumerate(rows)}
        some = Survey([found.digests[place[int(row)]] for row in wanted], found.sizes[:0])
        pictures = SomePictures(item.system.pictures, wanted.tolist())
        extracted = cached_features(pictures, some, features, cache, blur=radius, bar=bar)
        own = extracted if radius else extracted.rows([place[int(row)] for row in item.rows])
        groups = item.system.groups
        figures = compare(
            own,
            reference,
            features,
            seed=settings.seed,
            bootstrap=settings.bootstrap,
            groups=None if groups is None else np.unique(groups[item.rows], return_inverse=True)[1],
            frechet=frechet,
        )
        if radius == 0:
            result |= figures
            if item.subsets is not None and frechet is not None:
                sets = [[extracted.rows([place[int(row)] for row in draw[:, number]]) for draw in item.subsets]
                        for number in range(len(settings.pool_sizes))]  # fmt: skip
                result["pool"] = _pool_curve(item.system, sets, features, settings, frechet)
        if len(set(settings.radii) | {0.0}) > 1:
            curve = {key: value for key, value in figures.items() if key not in ("features", "warnings")}
            result.setdefault("blur", []).append({"radius": radius, **curve})


def _choose(system: System, settings: Settings) -> _Chosen:
    if not settings.pool_sizes or not system.pools:
        return _Chosen(system, np.arange(len(system.pictures)), None)
    lengths = [len(pool.lines) for pool in system.pools]
    most = max(settings.pool_sizes)
    small = [pool for pool in system.pools if len(pool.lines) < most]
    if small:
        raise UserError(
            f"system {system.name}: {len(small)} captions have fewer than {most} samples, as {small[0].prompt!r} with "
            f"{len(small[0].lines)}; give --pool sizes up to {min(lengths)}, or draw more"
        )
    cut = next((pool for pool in system.pools if not pool.whole), None)
    if cut is not None:
        raise UserError(
            f"system {system.name}: {system.spec} holds only the best of {cut.prompt!r}; rerank without --top, or a "
            "subset of the pool cannot be known"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    subsets = np.stack([
        starts[:, None] + best_of_subsets(lengths, settings.pool_sizes, settings.seed, repeat)
        for repeat in range(settings.repeats)
    ])  # fmt: skip
    return _Chosen(system, starts, subsets)


def _needed(item: _Chosen) -> NDArray[np.int64]:
    """The rows to measure, ascending: of a large pool reranking looks at few."""
    return item.rows if item.subsets is None else np.unique(np.concatenate([item.rows, item.subsets.ravel()]))


def _pool_curve(
    system: System, sets: Sequence[Sequence[Extracted]], features: Features, settings: Settings, frechet: FrechetTo
) -> list[dict[str, Any]]:
    """FID and score against the pool's size: mean and standard deviation over random subsets, ``sets`` by size."""
    lengths = {len(pool.lines) for pool in system.pools}
    curve = []
    for size, drawn in zip(settings.pool_sizes, sets, strict=True):
        # All subsets of the whole are the same.
        some = drawn[:1] if lengths == {size} else drawn
        point: dict[str, Any] = {"size": size, "n_generated": len(system.pools), "repeats": len(some)}
        point |= _mean_and_error("fid", [frechet(one.vectors) for one in some])
        if features.logits is not None:
            scores = [inception_score(one.logits, seed=settings.seed)[0] for one in some if one.logits is not None]
            point |= _mean_and_error(features.score_key, scores)
        curve.append(point)
    return curve


def _mean_and_error(name: str, values: Sequence[float]) -> dict[str, float | None]:
    error = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {name: float(np.mean(values)), f"{name}_error": error}


def _accuracy(system: System, settings: Settings) -> dict[str, Any] | None:
    """By the oracle, of captions of the shapes world; None where there are none."""
    if not system.pools:
        return None
    with progress(f"eval-fid: {system.name}", len(system.pools), "captions judged") as bar:
        judged = judge(system.pools, bar.advance)
    groups = accuracies(judged, settings.pool_sizes)
    return {name: accuracy_figures(group) for name, group in groups.items()} or None


def _refuse_missing(system: System) -> None:
    if system.origin != "lines":
        return
    paths = [system.pictures.name(row) for row in range(len(system.pictures))]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"system {system.name}: {missing[0]}: the sample's picture is missing, and so are {len(missing) - 1} "
            "others; draw them again with dalle sample, or run from the folder that it ran in"
        )


def _refuse_other_sizes(system: System, rows: NDArray[np.int64], found: Survey) -> None:
    if system.origin != "lines":
        return
    odd = np.flatnonzero((found.sizes != found.sizes[0]).any(axis=1))
    if len(odd):
        name = system.pictures.name(int(rows[odd[0]]))
        sizes = [" x ".join(str(side) for side in found.sizes[row]) for row in (odd[0], 0)]
        raise UserError(
            f"system {system.name}: {name} is {sizes[0]} pixels where the samples before are {sizes[1]} ({len(odd)} "
            "such pictures); draw them again with dalle sample"
        )


def _enlarged(name: str, found: Survey, size: int) -> list[str]:
    short = found.sizes.min(axis=1)
    small = int((short < size).sum())
    if not small:
        return []
    return [
        f"{name}: {small} of {len(short)} pictures are smaller than {size} pixels (the smallest {int(short.min())}) "
        "and were enlarged: figures at the pictures' own --size say more"
    ]


def _counts(chosen: Sequence[_Chosen]) -> list[str]:
    counts = {item.system.name: len(item.rows) for item in chosen}
    if len(set(counts.values())) < 2:
        return []
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [f"systems have different counts of pictures ({told}): FID falls and the score grows with the count; "
            "--limit makes them equal"]  # fmt: skip
