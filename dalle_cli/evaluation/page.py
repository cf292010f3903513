"""The report's figures as one HTML file: style and pictures are inside it, nothing is fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

Pngs = Mapping[str, bytes]
MOST_REASONS = 20
"""Reasons of a part that are shown; report.json has all."""


def page(figures: Mapping[str, Any], pngs: Pngs, recipe_yaml: str) -> str:
    """The whole document. ``figures`` is what report.json holds, ``pngs`` the pictures there are, by name."""
    style = files("dalle_cli.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    title = f"{figures['name']}: report"
    sections = [
        _oracle(figures, pngs),
        _contact_sheet(figures, pngs),
        _pool_size(figures, pngs),
        _reconstructions(figures, pngs),
        _codebook(figures, pngs),
        _losses(figures, pngs),
        _fid(figures["fid"]),
        _data(figures["data"]),
        _artifacts(figures["artifacts"], figures["missing"], recipe_yaml),
    ]
    body = "\n".join(section for section in sections if section)
    description = f"<p>{escape(figures['description'])}</p>" if figures["description"] else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{escape(figures["name"])}</h1>{description}
<p class="result">{_unbroken(figures["result"])}</p></header>
{body}
</main>
</body>
</html>
"""


def features_badge(features: str) -> tuple[str, bool]:
    """What a FID's features are called, and whether they are Inception's, so that published figures compare."""
    if features.startswith("inception"):
        return "Inception features", True
    return ("CLIP features", False) if features.startswith("clip") else (features, False)


def _unbroken(text: str) -> str:
    """Escaped, with figures held together with their signs at the ends of lines."""
    return escape(text).replace(" %", "&nbsp;%").replace(" ± ", "&nbsp;±&nbsp;")


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _absent(text: str) -> str:
    return f'<p class="absent">{escape(text)}</p>'


def _image(png: bytes | None, alt: str) -> str:
    if png is None:
        return ""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _plots(pngs: Pngs, names: Sequence[tuple[str, str]]) -> str:
    drawn = [
        f"<figure><h3>{escape(title)}</h3>{_image(pngs[name], title)}</figure>" for name, title in names if name in pngs
    ]
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells are HTML already; columns in ``numbers`` stand to the right."""
    kind = {place: ' class="number"' for place in numbers}
    head = "".join(f"<th{kind.get(i, '')}>{escape(name)}</th>" for i, name in enumerate(header))
    lines = [
        "<tr>" + "".join(f"<td{kind.get(i, '')}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _share(share: Mapping[str, float] | None) -> str:
    if share is None:
        return "–"
    return f'{100 * share["value"]:.1f}&nbsp;% <span class="error">± {100 * share["error"]:.1f}</span>'


def _oracle(figures: Mapping[str, Any], pngs: Pngs) -> str:
    oracle = figures["oracle"]
    if oracle is None:
        return ""
    rows = [
        [escape(name), _share(group["single"]), f"<strong>{_share(group['best'])}</strong>",
         _share(group["any_right"]), f"{group['prompts']}", f"{group['samples']:,}"]
        for name, group in oracle["groups"].items()
    ]  # fmt: skip
    pool = next(iter(oracle["groups"].values()))["pool_size"]
    header = ["captions with", "single sample", f"best of {pool} by CLIP", f"any of {pool}", "captions", "samples"]
    return _section(
        "Captions drawn right",
        _note(
            "A picture is right when measuring it finds exactly what the caption says: number of things, each one's "
            "size, colour and shape, and how they stand to one another. Held-out pairs are combinations of a colour "
            "and a shape that no training picture shows. ± is the binomial standard error over captions."
        ),
        *(f'<p class="warning">{escape(text)}</p>' for text in oracle["warnings"]),
        _table(header, rows, numbers=range(1, 6)),
    )


def _contact_sheet(figures: Mapping[str, Any], pngs: Pngs) -> str:
    sheet = figures["contact_sheet"]
    if sheet is None:
        return _section("Samples", _absent("No reranked samples were given: dalle sample ... | dalle rerank > FILE, "
                                           "then dalle report --ranked FILE."))  # fmt: skip
    return _section(
        "Samples",
        _note(
            f"{len(sheet['captions'])} of {sheet['captions_in_all']} captions, the first of each kind whether they "
            f"came out well or not. Scored by {sheet['scorer']}."
        ),
        f'<div class="wide">{_image(pngs["contact_sheet"], "contact sheet of samples")}</div>',
    )


def _pool_size(figures: Mapping[str, Any], pngs: Pngs) -> str:
    plots = _plots(pngs, [("bars", "By kind of caption"), ("pool_size", "Against the number of samples")])
    if not plots:
        return ""
    note = (
        "Against the number of samples: the mean over all subsets of each caption's samples, computed from the ranks."
        if "pool_size" in pngs
        else ""
    )
    return _section("Accuracy and reranking", plots, _note(note) if note else "")


def _reconstructions(figures: Mapping[str, Any], pngs: Pngs) -> str:
    found = figures["reconstructions"]
    if found is None:
        return _section("dVAE reconstructions", _absent("No dVAE with readable training pictures in this run."))
    what = "pictures that training never saw" if found["held_out"] else "training pictures (the recipe holds none out)"
    return _section(
        "dVAE reconstructions",
        _note(
            f"The first {len(found['psnr'])} {what}, above what the dVAE decodes from their tokens. PSNR "
            f"{found['psnr_mean']:.1f} dB on average, {min(found['psnr']):.1f} to {max(found['psnr']):.1f}; SSIM "
            f"{found['ssim_mean']:.3f} on average."
        ),
        f'<div class="wide">{_image(pngs["reconstructions"], "pictures and their reconstructions")}</div>',
    )


def _codebook(figures: Mapping[str, Any], pngs: Pngs) -> str:
    found = figures["codebook"]
    if found is None:
        return _section("Use of the codebook", _absent("No image tokens in this run."))
    return _section(
        "Use of the codebook",
        _note(
            f"{found['tokens']:,} tokens of {found['rows']:,} pictures. Of {found['codes']:,} codes "
            f"{found['dead']:,} are dead; the perplexity is {found['perplexity']:.1f}: as varied as that many codes in "
            "equal use."
        ),
        _plots(pngs, [("codebook", "Share of each code")]),
    )


def _losses(figures: Mapping[str, Any], pngs: Pngs) -> str:
    stages = figures["stages"]
    if not stages:
        return _section("Training", _absent("No stage was trained in this run."))
    rows = [
        [
            escape(stage["name"]),
            f"{stage['step']:,} of {stage['updates']:,}",
            ", ".join(f"{escape(name)} {value:.4g}" for name, value in stage["validation"].items()) or "–",
        ]
        for stage in stages.values()
    ]
    plots = _plots(
        pngs,
        [
            ("loss_dvae", "dVAE: reconstruction"),
            ("elbo_dvae", "dVAE: ELBO"),
            ("psnr_dvae", "dVAE: PSNR of reconstructions"),
            ("kl_dvae", "dVAE: KL to the uniform prior"),
            ("loss_prior", "Prior: cross-entropy"),
            ("loss_clip", "CLIP: contrastive loss"),
        ],
    )
    return _section("Training", plots, _table(["stage", "updates", "last validation (of the EMA)"], rows, numbers=[1]))


def _fid(fids: Sequence[Mapping[str, Any]]) -> str:
    if not fids:
        return _section("FID", _absent("No figures were given: dalle eval-fid ... --out FILE, then --fid FILE."))
    rows, notes = [], []
    for fid in fids:
        badge, published = features_badge(fid["features"])
        score = next((f"{escape(key)} {fid[key]:.2f}" for key in ("inception_score", "clip_is") if key in fid), "–")
        std = f' <span class="error">± {1000 * fid["kid_std"]:.2f}</span>' if fid.get("kid_std") is not None else ""
        rows.append(
            [
                f'<span class="badge{"" if published else " other"}">{escape(badge)}</span>'
                f'<br><span class="error">{escape(fid["features"])}</span>',
                f"<strong>{fid['fid']:.2f}</strong>",
                f"{1000 * fid['kid_mean']:.2f}{std}",
                score,
                f"{fid['n_generated']:,} / {fid['n_reference']:,}",
                f"<code>{escape(str(fid.get('generated', '')))}</code><br><code>{escape(str(fid.get('reference', '')))}"
                "</code>",
            ]
        )
        notes += [f"{fid['file']}: {text}" for text in fid.get("warnings", [])]
    foreign = any(not features_badge(fid["features"])[1] for fid in fids)
    return _section(
        "FID",
        '<p class="warning">Rows not on Inception features compare only with rows of the same features, never with '
        "published FID, KID or Inception Score.</p>"
        if foreign
        else "",
        _table(
            ["features", "FID", "KID x 1000", "score", "generated / reference", "pictures"], rows, numbers=[1, 2, 3, 4]
        ),
        *(f'<p class="warning">{escape(note)}</p>' for note in dict.fromkeys(notes)),
    )


def _data(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return ""
    usable = f"; {data['usable']:,} of them hold a caption and a picture" if data["usable"] is not None else ""
    rows = [
        [escape(part), escape(reason), f"{count:,}"]
        for part, counts in data["skipped"].items()
        for reason, count in list(counts.items())[:MOST_REASONS]
    ]
    return _section(
        "Data",
        _note(f"{data['rows']:,} samples{usable}.{' What was left out:' if rows else ''}"),
        _table(["part", "reason", "samples"], rows, numbers=[2]) if rows else "",
    )


def _artifacts(artifacts: Sequence[Mapping[str, Any]], missing: Sequence[str], recipe_yaml: str) -> str:
    rows = [
        [
            escape(row["artifact"]),
            f"<code>{escape(row['path'])}</code>",
            f"{row['step']:,}" if row["step"] is not None else "",
            f"<code>{row['sha256'][:16]}</code>" if row["sha256"] else "",
            "".join(f'<div class="line">{_belongs(item)}</div>' for item in row["belongs"]),
        ]
        for row in artifacts
    ]
    return _section(
        "Artifacts",
        _table(["artifact", "path in the run", "step", "sha256", "belongs to"], rows, numbers=[2]) if rows else "",
        f"<h3>Missing</h3><ul>{''.join(f'<li>{escape(text)}</li>' for text in missing)}</ul>" if missing else "",
        f"<details><summary>The recipe, resolved</summary><pre>{escape(recipe_yaml)}</pre></details>",
    )


def _belongs(item: Mapping[str, Any]) -> str:
    name = f"{escape(item['role'])} <code>{escape(item['sha256'][:16])}</code>"
    if item["in_this_run"] is None:
        return f'{name} <span class="error">not in this run</span>'
    if item["in_this_run"]:
        return f'{name} <span class="match">✓</span>'
    return f'{name} <span class="mismatch">✗ another is in this run</span>'
