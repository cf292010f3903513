"""Contents of a report, and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dalle_cli.report.artifacts import ArtifactRow
from dalle_cli.report.evaluations import CurveFigures, EvaluationRow, features_badge
from dalle_cli.report.image_tokens import CodebookFigures, ReconstructionFigures
from dalle_cli.report.samples import OracleFigures, SheetFigures
from dalle_cli.report.training import DrawingFigures, RetrievalFigures, StageFigures
from dalle_cli.shapes.accuracy import Share, accuracy_figures


@dataclass(frozen=True)
class DataFigures:
    """Rows of the token store, and the number of skipped rows of each part by reason, the most frequent first."""

    source: str
    rows: int
    usable: int | None
    """Number of rows with a caption and an image; None until both parts exist."""
    skipped: dict[str, dict[str, int]]


@dataclass(frozen=True)
class SamplesFigures:
    """A sample store and its settings; ``path`` is relative to the run's folder."""

    path: str
    captions: int
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportFigures:
    """Everything in a report; a section without content is None or empty."""

    name: str
    description: str
    oracle: OracleFigures | None
    contact_sheet: SheetFigures | None
    reconstructions: ReconstructionFigures | None
    data: DataFigures | None
    codebook: CodebookFigures | None
    stages: dict[str, StageFigures]
    drawings: DrawingFigures | None
    retrieval: RetrievalFigures | None
    fid: list[EvaluationRow]
    curves: list[CurveFigures]
    samples: list[SamplesFigures]
    artifacts: list[ArtifactRow]
    commands: list[dict[str, Any]]
    """Lines of commands.jsonl."""
    missing: list[str]

    @property
    def result(self) -> str:
        """Main result in one sentence: captions drawn right, else FID, else the samples, else the training."""
        if self.oracle is not None:
            groups = self.oracle.groups
            pool_size = next(iter(groups.values())).pool_size
            best = " and ".join(_of_captions(name, group.best) for name, group in groups.items())
            singles = [group.single for group in groups.values()]
            line = f"The best of {pool_size} samples by CLIP is right for {best}"
            if None not in singles:
                single = " and ".join(f"{100 * share.value:.0f} %" for share in singles if share is not None)
                line += f"; a single sample for {single}"
            return f"{line}."
        if self.fid:
            badge, _ = features_badge(self.fid[0].evaluation.features)
            system = self.fid[0].system
            return f"FID {system.fid:.2f} on {badge}, {system.n_generated:,} pictures against {system.n_reference:,}."
        if self.contact_sheet is not None:
            sheet = self.contact_sheet
            return f"{sheet.captions_in_all} captions drawn, ranked by {sheet.scorer}."
        if self.stages:
            stages = [f"{s.name} at update {s.step:,} of {s.updates:,}" for s in self.stages.values()]
            return f"No samples yet: {', '.join(stages)}."
        return "No samples yet, and no stage trained."

    def as_json(self) -> dict[str, Any]:
        """Return the contents of report.json."""
        values = asdict(self) | {"result": self.result, "fid": [row.as_json() for row in self.fid]}
        if self.oracle is not None:
            values["oracle"]["groups"] = {name: accuracy_figures(group) for name, group in self.oracle.groups.items()}
        return values


def _of_captions(group: str, share: Share) -> str:
    return f"{100 * share.value:.0f} ± {100 * share.error:.0f} % of captions with {group}"
