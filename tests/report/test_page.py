"""The report's page: text from outside is shown as text."""

from __future__ import annotations

import io

from helpers.html_page import Page
from PIL import Image

from dalle_cli.fid.figures import Evaluation, SystemFigures
from dalle_cli.report.artifacts import CheckpointRow, Reference
from dalle_cli.report.evaluations import CurveFigures, EvaluationRow
from dalle_cli.report.figures import DataFigures, ReportFigures, SamplesFigures
from dalle_cli.report.page import page
from dalle_cli.report.samples import OracleFigures, SheetFigures
from dalle_cli.report.training import DrawingFigures, RetrievalFigures, StageFigures
from dalle_cli.shapes.accuracy import Accuracy, Share
from dalle_cli.views.plots import Plot


def hostile(name: str) -> str:
    return f"<script>{name}</script>\"><img src=x onerror='alert(1)'>&amp;"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def test_script_in_any_value_is_shown_as_text() -> None:
    share = Share(0.5, 4)
    system = SystemFigures(
        name=hostile("system"),
        generated=hostile("generated"),
        fid=1.0,
        kid_mean=0.1,
        kid_subset_size=2,
        kid_subsets=1,
        score=1.0,
        n_generated=2,
        n_reference=2,
        feature_dimensions=2,
    )
    figures = ReportFigures(
        name=hostile("name"),
        description=hostile("description"),
        oracle=OracleFigures({hostile("group"): Accuracy(4, 8, 2, share, share, share, {})}, [hostile("oracle")]),
        contact_sheet=SheetFigures([hostile("caption")], 1, hostile("scorer"), []),
        reconstructions=None,
        data=DataFigures(hostile("source"), 4, 4, {hostile("part"): {hostile("reason"): 1}}),
        codebook=None,
        stages={"dvae": StageFigures(hostile("stage"), 1, 2, {hostile("metric"): 0.5}, None, [hostile("warning")])},
        fid=[
            EvaluationRow(
                hostile("file"),
                Evaluation(
                    command=hostile("fid command"),
                    reference=hostile("reference"),
                    size=32,
                    features=hostile("features"),
                    score_name=hostile("score"),  # type: ignore[arg-type]
                    systems=[system],
                ),
                system,
                [hostile("warning")],
            )
        ],
        drawings=DrawingFigures([1], [hostile("drawn")]),
        retrieval=RetrievalFigures(1, [hostile("found")]),
        curves=[CurveFigures(hostile("curves"), hostile("of"), {"blur_fid": "blur_fid_0"})],
        samples=[SamplesFigures(hostile("store"), 1, hostile("seed"), {hostile("setting"): hostile("value")})],
        artifacts=[
            CheckpointRow(
                artifact=hostile("artifact"),
                path=hostile("path"),
                step=1,
                sha256="<script>sha</script>",
                belongs=[Reference(hostile("role"), "<script>own</script>", None)],
                recipe="tiny",
            )
        ],
        commands=[{name: hostile(name) for name in ("artifact", "command", "finished")}],
        missing=[hostile("missing")],
    )
    pictures, plots = ("contact_sheet", "drawings", "retrieval"), ("bars", "pool_size", "loss_dvae", "blur_fid_0")
    drawn = dict.fromkeys(plots, Plot(png(), b"<svg/>"))
    text = page(figures, dict.fromkeys(pictures, png()), drawn, hostile("recipe"))
    found = Page(text)
    assert "script" not in found.tags
    assert len(found.images) == len(pictures) + len(plots)
    for name in plots:
        assert f'download="{name}.svg" href="data:image/svg+xml;base64,PHN2Zy8+"' in text
    shown = (
        *("name", "description", "group", "oracle", "scorer", "source", "part", "reason", "stage", "metric", "file"),
        *("fid command", "features", "score", "generated", "reference", "warning", "curves", "of", "store", "seed"),
        *("setting", "value", "artifact", "path", "role", "command", "finished", "missing", "recipe", "drawn"),
    )
    for name in shown:
        assert hostile(name) in found.text.replace("\xa0", " "), name
