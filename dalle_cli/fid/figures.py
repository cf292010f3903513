"""Metrics that ``eval-fid`` measured of each system, and their JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from dalle_cli.shapes.accuracy import Accuracy, accuracy_figures

FORMAT, VERSION = "dalle-eval-fid", 2
ScoreName = Literal["inception_score", "clip_is"]
"""Name of the score by class: on Inception's classes, or on class captions that CLIP compares with the pictures."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Distances of generated pictures to the reference, and scores of the generated pictures.

    ``_error`` is a standard error: over bootstrap sets for FID and score, binomial for precision and recall. None
    means that a metric was not measured, or is undefined for so few pictures.
    """

    fid: float
    fid_error: float | None = None
    kid_mean: float
    kid_std: float | None = None
    """Standard deviation over subsets; None for a single subset of all pictures."""
    kid_subset_size: int
    kid_subsets: int
    score: float | None = None
    """Score by class, named by its :data:`ScoreName` in JSON and CSV."""
    score_std: float | None = None
    """Standard deviation over splits; None for a single split."""
    score_splits: int | None = None
    score_error: float | None = None
    precision: float | None = None
    precision_error: float | None = None
    recall: float | None = None
    recall_error: float | None = None
    n_generated: int
    n_reference: int
    feature_dimensions: int


@dataclass(frozen=True, kw_only=True)
class BlurPoint(Figures):
    """Metrics with both sides blurred by a Gaussian of standard deviation ``radius``, in pixels."""

    radius: float


@dataclass(frozen=True)
class PoolPoint:
    """FID and score of the best of ``size`` samples per caption: mean and standard deviation over ``repeats`` draws."""

    size: int
    n_generated: int
    repeats: int
    fid: float
    fid_error: float | None = None
    score: float | None = None
    score_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Curves(Figures):
    """Metrics against one reference, and curves of them if requested."""

    blur: list[BlurPoint] = field(default_factory=list)
    pool: list[PoolPoint] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SystemFigures(Curves):
    """Metrics of one system."""

    name: str
    generated: str
    """Path of the system's pictures, as given."""
    warnings: list[str] = field(default_factory=list)
    without: Curves | None = None
    """Metrics against the reference without the pictures that ``Evaluation.without`` names."""
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    """Accuracy on captions of the shapes world, by kind of caption."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of all systems against one reference, and the settings of the measurement."""

    command: str = ""
    reference: str
    """Path of the real pictures, as given."""
    without: str | None = None
    """Path of the file that names reference pictures to leave out, as given."""
    size: int
    """Side of the cropped and resized pictures, in pixels."""
    seed: int = 0
    bootstrap: int = 0
    protocol: str | None = None
    """Captions and reference of a preset, in a sentence."""
    features: str
    """Name of the features behind FID, KID and score."""
    score_name: ScoreName
    systems: list[SystemFigures]
    warnings: list[str] = field(default_factory=list)


def comparable(features: str) -> str:
    """Return sentences that say which figures may be compared with those on ``features``."""
    return (
        f"FID, KID and scores are on {features}, and compare only with figures on the same features and pictures of "
        "the same size. The paper's are by the code of DM-GAN (and on CUB by an Inception fine-tuned on birds), so "
        "they do not compare."
    )


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return the JSON that ``eval-fid`` prints and writes."""
    found = {"format": FORMAT, "version": VERSION, "comparable": comparable(evaluation.features), **asdict(evaluation)}
    for system, figures in zip(found["systems"], evaluation.systems, strict=True):
        system["accuracy"] = accuracy_json(figures.accuracy)
    return {**found, "systems": _renamed(found["systems"], "score", evaluation.score_name)}


def read_evaluation(found: Any) -> Evaluation:
    """Parse the JSON of :func:`evaluation_json`.

    Raises:
        ValueError: it has another format or version, or lacks a metric.
    """
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it is not of the format {FORMAT}, version {VERSION}")
    try:
        systems = _renamed(found["systems"], found["score_name"], "score")
        for system in systems:
            system["accuracy"] = {group: _read_accuracy(accuracy) for group, accuracy in system["accuracy"].items()}
        return TypeAdapter(Evaluation).validate_python({**found, "systems": systems})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: missing") from None
    except (TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError("a value has another type than eval-fid writes") from None


def accuracy_json(accuracies: Mapping[str, Accuracy]) -> dict[str, Any]:
    """Return the accuracies, by kind of caption, as JSON."""
    return {group: accuracy_figures(accuracy) for group, accuracy in accuracies.items()}


def _renamed(value: Any, old: str, new: str) -> Any:
    """Replace the prefix ``old`` by ``new`` in all keys of a JSON value."""
    if isinstance(value, dict):
        return {
            new + key.removeprefix(old) if key.startswith(old) else key: _renamed(item, old, new)
            for key, item in value.items()
        }
    return [_renamed(item, old, new) for item in value] if isinstance(value, list) else value


def _read_accuracy(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an ``Accuracy``, not yet checked."""

    def share(value: Any) -> dict[str, Any] | None:
        return None if value is None else {"value": value["value"], "prompts": found["prompts"]}

    shares = {name: share(found[name]) for name in ("best", "single", "any_right")}
    by_pool_size = {int(size): share(value) for size, value in found["by_pool_size"].items()}
    counts = {name: found[name] for name in ("prompts", "samples", "pool_size")}
    return {**counts, **shares, "by_pool_size": by_pool_size}
