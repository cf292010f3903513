"""The report of a run: every figure in report.json, the same for people in report.html, and the contact sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_cli.clip.rerank import read_manifest
from dalle_cli.config.load import dump_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.fid.comparison import FORMAT
from dalle_cli.fid.plots import draw_plots
from dalle_cli.progress import progress
from dalle_cli.report.chain import NAMES, Chain, read_chain, requests_of_samples
from dalle_cli.report.exhibits import (
    choose_captions,
    codebook_use,
    reconstructions,
    samples_sheet,
    true_pictures,
)
from dalle_cli.report.page import features_badge, page
from dalle_cli.shapes.accuracy import JudgedPool, Pool, accuracies, accuracy_figures, group_by_caption, judge
from dalle_cli.stores.files import write_atomically, write_json
from dalle_cli.stores.samples import STORE
from dalle_cli.views import plots
from dalle_cli.views.contact_sheet import png_bytes

FID_KEYS = ("features", "fid", "kid_mean", "n_generated", "n_reference")
_CURVES: dict[str, tuple[str, list[plots.Curve], str]] = {
    "loss_dvae": (
        "dvae",
        [("recon_nll", "training", plots.BLUE), ("val_recon_nll", "validation", plots.ORANGE)],
        "-ln p(x|z), nats a value",
    ),
    "elbo_dvae": (
        "dvae",
        [("elbo", "training", plots.BLUE), ("val_elbo", "validation", plots.ORANGE)],
        "ELBO, nats a value",
    ),
    "psnr_dvae": ("dvae", [("val_psnr", "validation", plots.ORANGE)], "PSNR, dB"),
    "kl_dvae": (
        "dvae",
        [("kl_per_position", "training", plots.BLUE), ("val_kl_per_position", "validation", plots.ORANGE)],
        "KL, nats a token",
    ),
    "loss_prior": (
        "prior",
        [
            ("image", "image", plots.BLUE),
            ("val_image", "image, validation", plots.BLUE),
            ("text", "text", plots.ORANGE),
            ("val_text", "text, validation", plots.ORANGE),
        ],
        "nats a token",
    ),
    "loss_clip": (
        "clip",
        [("loss", "training", plots.BLUE), ("val_loss", "validation", plots.ORANGE)],
        "nats a picture",
    ),
}


@dataclass(frozen=True)
class Report:
    """Where the report lies, and its figures as report.json holds them."""

    html: Path
    figures: dict[str, Any]


def write_report(recipe: Recipe, ranked: Path | None, fids: Sequence[Path], out: Path) -> Report:
    """Write ``out/report.html``, ``report.json`` and, with ranked samples, ``contact-sheet.png``.

    ``ranked`` holds lines of ``dalle rerank``, ``fids`` are JSON files of ``dalle eval-fid``. Stages that the run
    lacks are named in the report.

    Raises:
        UserError: there is nothing at all to report on, or a file given is not what it should be.
    """
    chain = read_chain(recipe)
    evaluations = [_read_fid(file) for file in fids] + _find_fids(chain, fids)
    if chain.empty and ranked is None and not evaluations:
        raise UserError(
            f"{chain.places.root}: no stage has run yet; start with dalle train-dvae, or give --ranked FILE"
        )
    samples = _read_ranked(ranked) if ranked is not None else []
    named = {Path(line["store"]) for pool in samples for line in pool.lines if "store" in line}
    found = {path.resolve(): path for path in [*chain.places.samples.glob(f"**/{STORE}"), *named]}
    requests = requests_of_samples(sorted(found.values()))
    pngs: dict[str, bytes] = {}
    oracle = _oracle(samples, pngs)
    figures: dict[str, Any] = {
        "name": recipe.name,
        "description": recipe.description,
        "oracle": oracle,
        "contact_sheet": _contact_sheet(chain, samples, oracle is not None, pngs),
        "reconstructions": _reconstructions(chain, pngs),
        "data": _data(chain),
        "codebook": _codebook(chain, pngs),
        "stages": _stages(chain, pngs),
        "fid": [row for found in evaluations for row in _fid_rows(found)],
        "curves": _curves(evaluations, pngs),
        "samples": chain.samples(requests),
        "artifacts": chain.artifacts(requests),
        "commands": chain.commands(),
    }
    figures["missing"] = chain.missing
    figures["result"] = result_line(figures)
    if "contact_sheet" in pngs:
        write_atomically(out / "contact-sheet.png", pngs["contact_sheet"])
    write_json(out / "report.json", figures)
    write_atomically(out / "report.html", page(figures, pngs, dump_recipe(recipe)))
    return Report(out / "report.html", figures)


def result_line(figures: dict[str, Any]) -> str:
    """What came out, in one line, from the best there is to tell."""
    if figures["oracle"] is not None:
        groups = figures["oracle"]["groups"]
        first = next(iter(groups.values()))
        best = " and ".join(_told(name, group["best"]) for name, group in groups.items())
        line = f"The best of {first['pool_size']} samples by CLIP is right for {best}"
        if all(group["single"] is not None for group in groups.values()):
            singles = " and ".join(f"{100 * group['single']['value']:.0f} %" for group in groups.values())
            line += f"; a single sample for {singles}"
        return f"{line}."
    for fid in figures["fid"]:
        badge, _ = features_badge(fid["features"])
        return f"FID {fid['fid']:.2f} on {badge}, {fid['n_generated']:,} pictures against {fid['n_reference']:,}."
    if figures["contact_sheet"] is not None:
        sheet = figures["contact_sheet"]
        return f"{sheet['captions_in_all']} captions drawn, ranked by {sheet['scorer']}."
    if figures["stages"]:
        told = [f"{s['name']} at update {s['step']:,} of {s['updates']:,}" for s in figures["stages"].values()]
        return f"No samples yet: {', '.join(told)}."
    return "No samples yet, and no stage trained."


def _told(group: str, share: dict[str, float]) -> str:
    return f"{100 * share['value']:.0f} ± {100 * share['error']:.0f} % of captions with {group}"


def _read_ranked(file: Path) -> list[Pool]:
    try:
        with file.open(encoding="utf-8") as stream:
            found = group_by_caption(read_manifest(stream, str(file)), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); name a file of dalle rerank's lines") from None
    if not found:
        raise UserError(f"{file}: holds no sample; write dalle rerank's lines into it")
    return found


def _read_fid(file: Path) -> dict[str, Any]:
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


def _find_fids(chain: Chain, given: Sequence[Path]) -> list[dict[str, Any]]:
    """What eval-fid left in the run: files of its own format in the run's folder or one below."""
    known = {file.resolve() for file in given}
    root = chain.places.root
    found: list[dict[str, Any]] = []
    for file in sorted([*root.glob("*.json"), *root.glob("*/*.json")]):
        if file.resolve() in known or not _says_fid(file):
            continue
        figures = _read_fid(file)
        # A page and --out of one command hold the same.
        if not any(_same_evaluation(figures, other) for other in found):
            found.append(figures)
    return found


def _says_fid(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text) if f'"{FORMAT}"' in text else None
    except ValueError:
        return False
    # An earlier report.json has rows of that format, and is none itself.
    return isinstance(found, dict) and found.get("format") == FORMAT


def _same_evaluation(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one.get("command")) and one.get("command") == other.get("command")


def _fid_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each system, as a file of one system has it on top."""
    if "systems" not in found:
        return [{key: value for key, value in found.items() if key not in ("blur", "pool", "accuracy")}]
    common = {key: value for key, value in found.items() if key != "systems"}
    rows = []
    for number, system in enumerate(found["systems"]):
        own = {key: value for key, value in system.items() if key not in ("blur", "pool", "accuracy")}
        warnings = [*(found.get("warnings", []) if number == 0 else []), *system.get("warnings", [])]
        rows.append(common | own | {"warnings": warnings})
    return rows


def _curves(evaluations: Sequence[dict[str, Any]], pngs: dict[str, bytes]) -> list[dict[str, Any]]:
    """The curves of each evaluation that has some; its plots are drawn anew from its points."""
    curves = []
    for number, found in enumerate(evaluations):
        alone = {**found, "name": found.get("generated", "generated")}
        drawn = draw_plots({**found, "systems": found.get("systems", [alone])})
        names = {name: f"{name}_{number}" for name in drawn}
        pngs |= {names[name]: png for name, (png, _) in drawn.items()}
        if drawn:
            curves.append({"file": found["file"], "reference": found.get("reference"), "plots": names})
    return curves


def _oracle(samples: list[Pool], pngs: dict[str, bytes]) -> dict[str, Any] | None:
    with progress("report", len(samples), "captions judged") as bar:
        judged = judge(samples, bar.advance)
    if not judged:
        return None
    groups = accuracies(judged)
    pngs["bars"] = plots.accuracy_bars(groups)
    if (curve := plots.accuracy_by_pool_size(groups)) is not None:
        pngs["pool_size"] = curve
    return {
        "groups": {name: accuracy_figures(group) for name, group in groups.items()},
        "warnings": _warnings(samples, judged),
    }


def _warnings(samples: list[Pool], judged: list[JudgedPool]) -> list[str]:
    warnings = []
    if len(judged) < len(samples):
        warnings.append(f"{len(samples) - len(judged)} captions are not of the shapes world and are not judged")
    if not all(item.pool.whole for item in judged):
        warnings.append("these lines hold only the best of each caption; rerank without --top to judge single samples")
    elif len({len(item.right) for item in judged}) > 1:
        warnings.append("captions have pools of different sizes; the best of a caption is the best of its own pool")
    return warnings


def _contact_sheet(chain: Chain, samples: list[Pool], judged: bool, pngs: dict[str, bytes]) -> dict[str, Any] | None:
    if not samples:
        return None
    chosen = choose_captions(samples)
    true = {}
    # Where the oracle judges, a true picture would say nothing more.
    if chain.reader is not None and chain.source is not None and not judged:
        prompts, recipe = [pool.prompt for pool in chosen], chain.recipe
        true = true_pictures(prompts, chain.reader, chain.source, recipe.image_size, recipe.data.max_pixels)
    pngs["contact_sheet"] = png_bytes(samples_sheet(chosen, true, chain.recipe.name))
    return {
        "captions": [pool.prompt for pool in chosen],
        "captions_in_all": len(samples),
        "scorer": str(samples[0].lines[0].get("scorer", "CLIP")),
        "with_true_pictures": sorted(true),
    }


def _reconstructions(chain: Chain, pngs: dict[str, bytes]) -> dict[str, Any] | None:
    if "dvae" not in chain.checkpoints or chain.source is None:
        return None
    found = reconstructions(chain.checkpoints["dvae"], chain.source)
    if found is None:
        return None
    pngs["reconstructions"] = png_bytes(found.sheet)
    return {
        "psnr": found.psnr,
        "psnr_mean": round(sum(found.psnr) / len(found.psnr), 2),
        "ssim": found.ssim,
        "ssim_mean": round(sum(found.ssim) / len(found.ssim), 4),
        "held_out": found.held_out,
    }


def _data(chain: Chain) -> dict[str, Any] | None:
    """Rows of the token store, and what each part leaves out and why, the most frequent reason first."""
    if chain.reader is None:
        return None
    parts = {part: chain.reader.attributes[part] for part in ("text", "image") if part in chain.reader.attributes}
    return {
        "source": ", ".join(dict.fromkeys(str(state["identity"].get("source")) for state in parts.values())),
        "rows": max((int(state["rows"]) for state in parts.values()), default=0),
        "usable": len(chain.reader.usable()) if len(parts) == 2 else None,
        "skipped": {
            part: dict(sorted(state["skipped"].items(), key=lambda item: (-item[1], item[0])))
            for part, state in parts.items()
        },
    }


def _codebook(chain: Chain, pngs: dict[str, bytes]) -> dict[str, Any] | None:
    found = codebook_use(chain.reader) if chain.reader is not None else None
    if found is None:
        return None
    pngs["codebook"] = plots.codebook_histogram(found.counts, found.perplexity)
    return {
        "codes": len(found.counts),
        "rows": found.rows,
        "tokens": int(found.counts.sum()),
        "dead": found.dead,
        "perplexity": round(found.perplexity, 3),
    }


def _stages(chain: Chain, pngs: dict[str, bytes]) -> dict[str, Any]:
    for name, (kind, curves, unit) in _CURVES.items():
        drawn = plots.loss_curves(chain.metrics(kind), curves, unit) if kind in chain.checkpoints else None
        if drawn is not None:
            pngs[name] = drawn
    return {
        kind: {
            "name": NAMES[kind],
            "step": checkpoint.step,
            "updates": getattr(checkpoint.recipe(), kind).training.updates,
            "validation": checkpoint.metrics,
            "last": next(iter(reversed([line for line in chain.metrics(kind) if "loss" in line])), None),
        }
        for kind, checkpoint in chain.checkpoints.items()
    }
