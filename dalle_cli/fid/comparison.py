"""Compare systems with one reference: metrics, and curves over the blur's radius and the reranking pool's size.

Each picture's features are extracted once per radius. Reranking uses the scores that the samples already have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dalle_cli.errors import UserError
from dalle_cli.fid.features import CachedFeatures, Features, cached_features
from dalle_cli.fid.figures import BlurPoint, Curves, Figures, PoolPoint, SystemFigures
from dalle_cli.fid.metrics import FrechetTo, check_counts, compare, inception_score, warnings_about
from dalle_cli.fid.pictures import Pictures, PictureSubset, Survey, survey
from dalle_cli.fid.systems import System, check_same_captions
from dalle_cli.progress import Progress, progress
from dalle_cli.randomness import numpy_generator
from dalle_cli.shapes.accuracy import Accuracy, accuracies, judge


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison."""

    radii: Sequence[float] = (0.0,)
    """Radii of the blur, in pixels."""
    pool_sizes: Sequence[int] = ()
    """Sizes of the pools to rerank; empty for no reranking."""
    repeats: int = 10
    """Number of random subsets for each pool size."""
    bootstrap: int = 0
    """Number of bootstrap sets for the standard errors; 0 for no errors."""
    seed: int = 0


@dataclass(frozen=True)
class _Selection:
    """A system and the rows of its pictures to measure."""

    system: System
    own: NDArray[np.int64]
    """Rows behind the system's own metrics, ascending."""
    rows: NDArray[np.int64]
    """All rows to measure, ascending: the own rows and those in ``subsets``."""
    subsets: NDArray[np.int64] | None = None
    """Best row of each random subset, (repeats, captions, sizes); None for a system without scores."""

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices of ``rows`` among all rows to measure."""
        return np.searchsorted(self.rows, rows)

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """Index of each own row's caption; None if captions are unknown."""
        groups = self.system.groups
        return None if groups is None else np.unique(groups[self.own], return_inverse=True)[1]


@dataclass(frozen=True)
class _Extraction:
    """Cached extraction of features, with a progress bar."""

    features: Features
    cache: Path
    bar: Progress

    def __call__(self, pictures: Pictures, digests: Sequence[str], radius: float) -> CachedFeatures:
        return cached_features(pictures, digests, self.features, self.cache, blur=radius, bar=self.bar)


def compare_systems(
    systems: Sequence[System],
    reference: Pictures,
    features: Features,
    settings: Settings,
    cache: Path,
    left_out: NDArray[np.bool_] | None = None,
) -> tuple[list[SystemFigures], list[str]]:
    """Return the metrics of each system, and warnings about all of them together.

    ``left_out`` (n,) marks reference pictures without which all is measured once more, as ``without``. Radii other than
    0 add ``blur`` points. With pool sizes, a system whose pictures have scores is measured by the best
    of each caption's whole pool, and gets ``pool`` points, and ``accuracy`` on captions of the shapes world.

    Raises:
        UserError: a picture is missing, broken, or of another size than the rest of its system; a pool is smaller than
            a requested size; there are too few pictures; or two systems have no caption in common.
    """
    warnings = check_same_captions(systems)
    chosen = [_choose(system, settings) for system in systems]
    if settings.pool_sizes and all(item.subsets is None for item in chosen):
        raise UserError("--pool: no system has scores to rerank by; rerank its samples first: dalle rerank")
    if left_out is not None and (rest := int((~left_out).sum())) < 2:
        raise UserError(
            f"--without: leaves {rest} of {len(left_out)} reference pictures; a distribution needs two or more"
        )
    for item in chosen:
        _check_present(item.system)
        check_counts(len(item.own), len(reference), f"system {item.system.name}")
    looks = len(reference) + sum(len(item.rows) for item in chosen)
    with progress("eval-fid: looking at files", looks, "pictures") as bar:
        real = survey(reference, bar.advance)
        surveys = [survey(PictureSubset(item.system.pictures, item.rows), bar.advance) for item in chosen]
    warnings += _enlarged("the reference", real, reference.image_size)
    for item, found in zip(chosen, surveys, strict=True):
        _check_sizes(item, found)
        warnings += _enlarged(item.system.name, found, item.system.pictures.image_size)
    warnings += _unequal_counts(chosen)

    radii = sorted({0.0, *settings.radii})
    references = 1 if left_out is None else 2
    figures: list[list[list[Figures]]] = [[[] for _ in range(references)] for _ in chosen]
    pools: list[list[list[PoolPoint]]] = [[[] for _ in range(references)] for _ in chosen]
    steps = len(radii) * (len(reference) + sum(len(item.own) for item in chosen))
    steps += sum(len(item.rows) - len(item.own) for item in chosen)
    with progress(f"eval-fid: {features.name.split()[0]} features", steps, "pictures") as bar:
        extract = _Extraction(features, cache, bar)
        for radius in radii:
            whole = extract(reference, real.digests, radius).whole()
            targets = [whole] if left_out is None else [whole, whole.rows(np.flatnonzero(~left_out))]
            frechets = [
                FrechetTo(target.vectors, features.device) if settings.bootstrap or settings.pool_sizes else None
                for target in targets
            ]
            for number, (item, found) in enumerate(zip(chosen, surveys, strict=True)):
                # Only unblurred pictures are reranked.
                rows = item.rows if radius == 0 else item.own
                digests = [found.digests[place] for place in item.places(rows)]
                extracted = extract(PictureSubset(item.system.pictures, rows), digests, radius)
                own = extracted.rows(item.places(item.own)) if radius == 0 else extracted.whole()
                for place, (target, frechet) in enumerate(zip(targets, frechets, strict=True)):
                    figures[number][place].append(
                        compare(
                            own,
                            target,
                            seed=settings.seed,
                            bootstrap=settings.bootstrap,
                            groups=item.groups,
                            frechet=frechet,
                        )
                    )
                    if radius == 0 and frechet is not None:
                        pools[number][place] = _pool_curve(item, extracted, settings, frechet)
    results = []
    for item, measured, pooled in zip(chosen, figures, pools, strict=True):
        curves = [_curves(radii, points, pool) for points, pool in zip(measured, pooled, strict=True)]
        results.append(
            SystemFigures(
                name=item.system.name,
                generated=item.system.spec,
                **vars(curves[0]),
                warnings=[*features.warnings, *warnings_about(curves[0], features.score_name)],
                without=curves[1] if left_out is not None else None,
                accuracy=_accuracy(item.system, settings),
            )
        )
    return results, list(dict.fromkeys(warnings))


def _curves(radii: Sequence[float], figures: Sequence[Figures], pool: list[PoolPoint]) -> Curves:
    """Return the metrics at the first radius, 0. If there are further ``radii``, all of them make the blur's curve."""
    blur = [BlurPoint(radius=radius, **vars(one)) for radius, one in zip(radii, figures, strict=True)]
    return Curves(**vars(figures[0]), blur=blur if len(radii) > 1 else [], pool=pool)


def best_of_subsets(pool_sizes: Sequence[int], sizes: Sequence[int], seed: int, repeat: int) -> NDArray[np.int64]:
    """Draw a random subset of each caption's pool for each size; return the best sample's index, (captions, sizes).

    Index 0 is a pool's best sample. Rank r (from 1) of n is the best of k with probability C(n - r, k - 1) / C(n, k). A
    caption's subsets come from one permutation of its pool, so larger ones contain smaller ones.
    """
    if not all(1 <= size <= min(pool_sizes) for size in sizes):
        raise ValueError(f"subsets of {sizes} of pools of {min(pool_sizes)} samples or more")
    rng = numpy_generator(seed, "pool", repeat)
    last = np.array(sizes) - 1
    chosen = np.empty((len(pool_sizes), len(sizes)), np.int64)
    for row, n in enumerate(pool_sizes):
        chosen[row] = np.minimum.accumulate(rng.permutation(n))[last]
    return chosen


def _choose(system: System, settings: Settings) -> _Selection:
    if not settings.pool_sizes or not system.pools:
        everything = np.arange(len(system.pictures))
        return _Selection(system, everything, everything)
    lengths = [len(pool.lines) for pool in system.pools]
    most = max(settings.pool_sizes)
    small = [pool for pool in system.pools if len(pool.lines) < most]
    if small:
        raise UserError(
            f"system {system.name}: {len(small)} captions have fewer than {most} samples, such as {small[0].prompt!r} "
            f"with {len(small[0].lines)}; give --pool sizes up to {min(lengths)}, or draw more"
        )
    cut = next((pool for pool in system.pools if not pool.whole), None)
    if cut is not None:
        raise UserError(
            f"system {system.name}: {system.spec} holds only the best samples of {cut.prompt!r}, so subsets of its "
            "pool cannot be drawn; rerank without --top"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    subsets = np.stack([
        starts[:, None] + best_of_subsets(lengths, settings.pool_sizes, settings.seed, repeat)
        for repeat in range(settings.repeats)
    ])  # fmt: skip
    return _Selection(system, starts, np.unique(np.concatenate([starts, subsets.ravel()])), subsets)


def _pool_curve(item: _Selection, extracted: CachedFeatures, settings: Settings, frechet: FrechetTo) -> list[PoolPoint]:
    """Return FID and score of the best of random subsets, for each pool size."""
    if item.subsets is None:
        return []
    lengths = {len(pool.lines) for pool in item.system.pools}
    curve = []
    for number, size in enumerate(settings.pool_sizes):
        # The only subset of full size is the pool itself.
        draws = item.subsets[:1] if lengths == {size} else item.subsets
        fids, scores = [], []
        for draw in draws:
            best = extracted.rows(item.places(draw[:, number]))
            fids.append(frechet(best.vectors))
            if best.logits is not None:
                scores.append(inception_score(best.logits, seed=settings.seed).mean)
        curve.append(
            PoolPoint(
                size=size,
                n_generated=len(item.system.pools),
                repeats=len(draws),
                fid=float(np.mean(fids)),
                fid_error=_deviation(fids),
                score=float(np.mean(scores)) if scores else None,
                score_error=_deviation(scores),
            )
        )
    return curve


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _accuracy(system: System, settings: Settings) -> dict[str, Accuracy]:
    """Return the accuracy on captions of the shapes world, by kind of caption; empty without reranking."""
    if not settings.pool_sizes or not system.pools:
        return {}
    with progress(f"eval-fid: {system.name}", len(system.pools), "captions judged") as bar:
        judged = judge(system.pools, bar.advance)
    return accuracies(judged, settings.pool_sizes)


def _check_present(system: System) -> None:
    if system.origin != "lines":
        return
    missing = [row for row in range(len(system.pictures)) if not Path(system.pictures.name(row)).is_file()]
    if missing:
        raise UserError(
            f"system {system.name}: {system.pictures.name(missing[0])}: the sample's picture is missing, and so are "
            f"{len(missing) - 1} others; draw them again with dalle sample, or run in the folder where dalle sample ran"
        )


def _check_sizes(item: _Selection, found: Survey) -> None:
    system = item.system
    if system.origin != "lines":
        return
    odd = np.flatnonzero((found.sizes != found.sizes[0]).any(axis=1))
    if len(odd):
        name = system.pictures.name(int(item.rows[odd[0]]))
        sizes = [" x ".join(str(side) for side in found.sizes[place]) for place in (odd[0], 0)]
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
        "and were enlarged; measure at the pictures' own size with --size"
    ]


def _unequal_counts(chosen: Sequence[_Selection]) -> list[str]:
    counts = {item.system.name: len(item.own) for item in chosen}
    if len(set(counts.values())) < 2:
        return []
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [
        f"systems have different counts of pictures ({listed}): FID falls and the score grows with the count; "
        "--limit makes them equal"
    ]
