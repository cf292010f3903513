"""Read what ``dalle eval-fid`` measured: rows of figures, and curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_cli.errors import UserError
from dalle_cli.fid.comparison import FORMAT
from dalle_cli.fid.plots import SCORES, draw_plots

FID_KEYS = ("features", "fid", "kid_mean", "n_generated", "n_reference")


@dataclass(frozen=True)
class EvaluationRow:
    """Figures of one system in an evaluation; ``values`` is what report.json holds of it."""

    file: str
    command: str
    features: str
    fid: float
    kid_mean: float
    kid_std: float | None
    score_name: str
    score: float | None
    n_generated: int
    n_reference: int
    generated: str
    reference: str
    warnings: list[str]
    values: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return what report.json holds of this row."""
        return self.values


@dataclass(frozen=True)
class CurveFigures:
    """Curves of an evaluation: the name of each plot's picture by the kind of plot."""

    file: str
    reference: str | None
    plots: dict[str, str]


def features_badge(features: str) -> tuple[str, bool]:
    """Return a short name of the features, and whether they are Inception's, which published figures use."""
    if features.startswith("inception"):
        return "Inception features", True
    return ("CLIP features", False) if features.startswith("clip") else (features, False)


def find_evaluations(run: Path, given: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the given evaluations, then those that lie in the run's folder or one below it.

    A page and a file of one command hold the same evaluation, which is read once.

    Raises:
        UserError: a file is not one of ``dalle eval-fid --out``.
    """
    evaluations = [_read(file) for file in given]
    known = {file.resolve() for file in given}
    found: list[dict[str, Any]] = []
    for file in sorted([*run.glob("*.json"), *run.glob("*/*.json")]):
        if file.resolve() in known or not _has_format(file):
            continue
        evaluation = _read(file)
        if not any(evaluation.get("command") and evaluation["command"] == other.get("command") for other in found):
            found.append(evaluation)
    return evaluations + found


def evaluation_rows(evaluations: Sequence[dict[str, Any]]) -> list[EvaluationRow]:
    """Return a row for each system of each evaluation."""
    return [row for evaluation in evaluations for row in _rows(evaluation)]


def draw_curves(evaluations: Sequence[dict[str, Any]]) -> tuple[list[CurveFigures], dict[str, bytes]]:
    """Draw the curves of each evaluation that has some, as PNG by name."""
    curves: list[CurveFigures] = []
    pngs: dict[str, bytes] = {}
    for number, found in enumerate(evaluations):
        alone = {**found, "name": found.get("generated", "generated")}
        drawn = draw_plots({**found, "systems": found.get("systems", [alone])})
        names = {name: f"{name}_{number}" for name in drawn}
        pngs |= {names[name]: png for name, (png, _) in drawn.items()}
        if drawn:
            curves.append(CurveFigures(found["file"], found.get("reference"), names))
    return curves, pngs


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); name a file of dalle eval-fid --out") from None
    if not _is_fid(found):
        raise UserError(f"{file}: is not a file of dalle eval-fid --out (it needs {', '.join(FID_KEYS)})")
    return {**found, "file": str(file)}


def _is_fid(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    systems = found["systems"] if found.get("format") == FORMAT and "systems" in found else [found]
    return bool(systems) and all(key in {**found, **system} for system in systems for key in FID_KEYS)


def _has_format(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text) if f'"{FORMAT}"' in text else None
    except ValueError:
        return False
    # An earlier report.json has rows of this format, but is none itself.
    return isinstance(found, dict) and found.get("format") == FORMAT


def _rows(found: dict[str, Any]) -> list[EvaluationRow]:
    common = {key: value for key, value in found.items() if key != "systems"}
    rows = []
    for number, system in enumerate(found.get("systems", [found])):
        own = {key: value for key, value in system.items() if key not in ("blur", "pool", "accuracy")}
        values = {key: value for key, value in (common | own).items() if key not in ("blur", "pool", "accuracy")}
        if "systems" in found:
            values["warnings"] = [*(found.get("warnings", []) if number == 0 else []), *system.get("warnings", [])]
        score_name = next((key for key in SCORES if key in values), "")
        rows.append(
            EvaluationRow(
                file=values["file"],
                command=values.get("command", ""),
                features=values["features"],
                fid=values["fid"],
                kid_mean=values["kid_mean"],
                kid_std=values.get("kid_std"),
                score_name=score_name,
                score=values.get(score_name),
                n_generated=values["n_generated"],
                n_reference=values["n_reference"],
                generated=str(values.get("generated", "")),
                reference=str(values.get("reference", "")),
                warnings=values.get("warnings", []),
                values=values,
            )
        )
    return rows
