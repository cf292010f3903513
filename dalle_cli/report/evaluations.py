"""Read the results of ``dalle eval-fid`` as rows of metrics and curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dalle_cli.errors import UserError
from dalle_cli.fid.figures import FORMAT, VERSION, Evaluation, SystemFigures, evaluation_json, read_evaluation
from dalle_cli.fid.plots import draw_plots
from dalle_cli.views.plots import Plot

CURVES = ("blur", "pool", "accuracy")
"""Keys of a system's figures that the report draws instead of listing."""


@dataclass(frozen=True)
class EvaluationFile:
    """An evaluation and the file it was read from."""

    file: str
    evaluation: Evaluation


@dataclass(frozen=True)
class EvaluationRow:
    """Metrics of one system, with its warnings; the first row of an evaluation has the evaluation's warnings too."""

    file: str
    evaluation: Evaluation
    system: SystemFigures
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the row's entry in report.json."""
        values = evaluation_json(replace(self.evaluation, systems=[self.system]))
        system = {key: value for key, value in values.pop("systems")[0].items() if key not in CURVES}
        return values | system | {"warnings": self.warnings, "file": self.file}


@dataclass(frozen=True)
class CurveFigures:
    """Curves of an evaluation: the picture's name for each kind of plot."""

    file: str
    reference: str
    plots: dict[str, str]


def features_badge(features: str) -> tuple[str, bool]:
    """Return a short name of the features, and whether they are Inception's, as in published figures."""
    if features.startswith("inception"):
        return "Inception features", True
    return ("CLIP features", False) if features.startswith("clip") else (features, False)


def find_evaluations(run: Path, given: Sequence[Path]) -> list[EvaluationFile]:
    """Read the given evaluations, then others in the run's folder or one level below, one for each command line.

    Raises:
        UserError: a file is not one of ``dalle eval-fid --out``.
    """
    evaluations = [_read(file) for file in given]
    known = {file.resolve() for file in given}
    found: list[EvaluationFile] = []
    for file in sorted([*run.glob("*.json"), *run.glob("*/*.json")]):
        if file.resolve() in known or not _has_format(file):
            continue
        one = _read(file)
        command = one.evaluation.command
        if not command or all(command != other.evaluation.command for other in found):
            found.append(one)
    return evaluations + found


def evaluation_rows(evaluations: Sequence[EvaluationFile]) -> list[EvaluationRow]:
    """Return a row for each system of each evaluation."""
    return [
        EvaluationRow(
            found.file,
            found.evaluation,
            system,
            [*(found.evaluation.warnings if number == 0 else []), *system.warnings],
        )
        for found in evaluations
        for number, system in enumerate(found.evaluation.systems)
    ]


def draw_curves(evaluations: Sequence[EvaluationFile]) -> tuple[list[CurveFigures], dict[str, Plot]]:
    """Draw the curves of the evaluations, by name."""
    curves: list[CurveFigures] = []
    plots: dict[str, Plot] = {}
    for number, found in enumerate(evaluations):
        drawn = draw_plots(found.evaluation)
        names = {name: f"{name}_{number}" for name in drawn}
        plots |= {names[name]: plot for name, plot in drawn.items()}
        if drawn:
            curves.append(CurveFigures(found.file, found.evaluation.reference, names))
    return curves, plots


def _read(file: Path) -> EvaluationFile:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); name a file of dalle eval-fid --out") from None
    try:
        return EvaluationFile(str(file), read_evaluation(found))
    except ValueError as error:
        raise UserError(f"{file}: is not a file of dalle eval-fid --out ({error}); measure again") from None


def _has_format(file: Path) -> bool:
    if not file.is_file():  # such as a link to nothing, or a pipe, which would block
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text) if f'"{FORMAT}"' in text else None
    except (ValueError, RecursionError):
        return False
    # An earlier report.json contains rows of this format, but is not an evaluation.
    return isinstance(found, dict) and (found.get("format"), found.get("version")) == (FORMAT, VERSION)
