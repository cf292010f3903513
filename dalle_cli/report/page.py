"""The report's figures as one HTML file: style and pictures are inside it, nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dalle_cli.fid.plots import SCORES, TITLES
from dalle_cli.views.html import Pngs, absent, document, image, note, plot_grid, section, table, unbroken, warning

MOST_REASONS = 20
"""Reasons of a part that are shown; report.json has all."""


def page(figures: Mapping[str, Any], pngs: Pngs, recipe_yaml: str) -> str:
    """The whole document. ``figures`` is what report.json holds, ``pngs`` the pictures there are, by name."""
    sections = [
        _oracle(figures, pngs),
        _contact_sheet(figures, pngs),
        _pool_size(figures, pngs),
        _reconstructions(figures, pngs),
        _codebook(figures, pngs),
        _losses(figures, pngs),
        _fid(figures["fid"]),
        _curves(figures["curves"], pngs),
        _data(figures["data"]),
        _drawn(figures["samples"]),
        _artifacts(figures["artifacts"], figures["missing"], recipe_yaml),
        _commands(figures["commands"], figures["fid"]),
    ]
    body = "\n".join(filter(None, sections))
    description = f"<p>{escape(figures['description'])}</p>" if figures["description"] else ""
    header = f"""<header><h1>{escape(figures["name"])}</h1>{description}
<p class="result">{unbroken(figures["result"])}</p></header>
"""
    return document(f"{figures['name']}: report", header + body)


def features_badge(features: str) -> tuple[str, bool]:
    """What a FID's features are called, and whether they are Inception's, so that published figures compare."""
    if features.startswith("inception"):
        return "Inception features", True
    return ("CLIP features", False) if features.startswith("clip") else (features, False)


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
    return section(
        "Captions drawn right",
        note(
            "A picture is right when measuring it finds exactly what the caption says: number of things, each one's "
            "size, colour and shape, and how they stand to one another. Held-out pairs are combinations of a colour "
            "and a shape that no training picture shows. ± is the binomial standard error over captions."
        ),
        *map(warning, oracle["warnings"]),
        table(header, rows, numbers=range(1, 6)),
    )


def _contact_sheet(figures: Mapping[str, Any], pngs: Pngs) -> str:
    sheet = figures["contact_sheet"]
    if sheet is None:
        return section("Samples", absent("No reranked samples were given: dalle sample ... | dalle rerank > FILE, "
                                           "then dalle report --ranked FILE."))  # fmt: skip
    return section(
        "Samples",
        note(
            f"{len(sheet['captions'])} of {sheet['captions_in_all']} captions, the first of each kind whether they "
            f"came out well or not. Scored by {sheet['scorer']}."
        ),
        f'<div class="wide">{image(pngs["contact_sheet"], "contact sheet of samples")}</div>',
    )


def _pool_size(figures: Mapping[str, Any], pngs: Pngs) -> str:
    plots = plot_grid(pngs, [("bars", "By kind of caption"), ("pool_size", "Against the number of samples")])
    if not plots:
        return ""
    told = (
        "Against the number of samples: the mean over all subsets of each caption's samples, computed from the ranks."
        if "pool_size" in pngs
        else ""
    )
    return section("Accuracy and reranking", plots, note(told) if told else "")


def _reconstructions(figures: Mapping[str, Any], pngs: Pngs) -> str:
    found = figures["reconstructions"]
    if found is None:
        return section("dVAE reconstructions", absent("No dVAE with readable training pictures in this run."))
    what = "pictures that training never saw" if found["held_out"] else "training pictures (the recipe holds none out)"
    return section(
        "dVAE reconstructions",
        note(
            f"The first {len(found['psnr'])} {what}, above what the dVAE decodes from their tokens. PSNR "
            f"{found['psnr_mean']:.1f} dB on average, {min(found['psnr']):.1f} to {max(found['psnr']):.1f}; SSIM "
            f"{found['ssim_mean']:.3f} on average."
        ),
        f'<div class="wide">{image(pngs["reconstructions"], "pictures and their reconstructions")}</div>',
    )


def _codebook(figures: Mapping[str, Any], pngs: Pngs) -> str:
    found = figures["codebook"]
    if found is None:
        return section("Use of the codebook", absent("No image tokens in this run."))
    return section(
        "Use of the codebook",
        note(
            f"{found['tokens']:,} tokens of {found['rows']:,} pictures. Of {found['codes']:,} codes "
            f"{found['dead']:,} are dead; the perplexity is {found['perplexity']:.1f}: as varied as that many codes in "
            "equal use."
        ),
        plot_grid(pngs, [("codebook", "Share of each code")]),
    )


def _losses(figures: Mapping[str, Any], pngs: Pngs) -> str:
    stages = figures["stages"]
    if not stages:
        return section("Training", absent("No stage was trained in this run."))
    rows = [
        [
            escape(stage["name"]),
            f"{stage['step']:,} of {stage['updates']:,}",
            ", ".join(f"{escape(name)} {value:.4g}" for name, value in stage["validation"].items()) or "–",
        ]
        for stage in stages.values()
    ]
    plots = plot_grid(
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
    return section("Training", plots, table(["stage", "updates", "last validation (of the EMA)"], rows, numbers=[1]))


def _fid(fids: Sequence[Mapping[str, Any]]) -> str:
    if not fids:
        return section("FID", absent("No figures were given: dalle eval-fid ... --out FILE, then --fid FILE."))
    rows, notes = [], []
    for fid in fids:
        badge, published = features_badge(fid["features"])
        score = next((f"{escape(key)} {fid[key]:.2f}" for key in SCORES if key in fid), "–")
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
    return section(
        "FID",
        '<p class="warning">Rows not on Inception features compare only with rows of the same features, never with '
        "published FID, KID or Inception Score.</p>"
        if foreign
        else "",
        table(
            ["features", "FID", "KID x 1000", "score", "generated / reference", "pictures"], rows, numbers=[1, 2, 3, 4]
        ),
        *map(warning, dict.fromkeys(notes)),
    )


def _curves(curves: Sequence[Mapping[str, Any]], pngs: Pngs) -> str:
    parts = []
    for found in curves:
        told = f"{found['file']}, against {found['reference']}."
        parts += [plot_grid(pngs, [(found["plots"][name], title) for name, title in TITLES.items()
                                   if name in found["plots"]]), note(told)]  # fmt: skip
    return section("Blur and reranking", *parts) if parts else ""


def _drawn(samples: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [f"<code>{escape(found['path'])}</code>", f"{found['captions']:,}", f"{found['seed']}",
         escape(", ".join(f"{name} {value}" for name, value in found["settings"].items()))]
        for found in samples
    ]  # fmt: skip
    return (
        section("How samples were drawn", table(["store", "captions", "seed", "settings"], rows, [1, 2]))
        if rows
        else ""
    )


def _commands(commands: Sequence[Mapping[str, Any]], fids: Sequence[Mapping[str, Any]]) -> str:
    lines = [(line["artifact"], line["command"], line.get("sha256"), line.get("finished")) for line in commands]
    lines += [(fid["file"], fid["command"], None, None) for fid in fids if fid.get("command")]
    rows = [
        [f"<code>{escape(str(artifact))}</code>", f'<code class="command">{escape(str(command))}</code>',
         f"<code>{escape(str(sha256)[:16])}</code>" if sha256 else "", escape(str(finished or ""))]
        for artifact, command, sha256, finished in dict.fromkeys(lines)
    ]  # fmt: skip
    if not rows:
        return section("Commands", absent("This run has no commands.jsonl: it was made before commands were recorded."))
    return section(
        "Commands",
        note("What made each artifact, in the order in which they were finished; run again, it makes the same bytes."),
        table(["made", "command", "sha256", "finished"], rows),
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
    return section(
        "Data",
        note(f"{data['source']}: {data['rows']:,} samples{usable}.{' What was left out:' if rows else ''}"),
        table(["part", "reason", "samples"], rows, numbers=[2]) if rows else "",
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
    return section(
        "Artifacts",
        table(["artifact", "path in the run", "step", "sha256", "belongs to"], rows, numbers=[2]) if rows else "",
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
