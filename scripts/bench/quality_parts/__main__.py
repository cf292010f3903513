"""Train systems on one data set within one budget of time, and score their pictures for held-out captions."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dalle_cli.config.load import load_recipe
from dalle_cli.data.images import decode_image, eval_crop, read_picture
from dalle_cli.shapes.accuracy import Pool, claim_of, group_of, load_picture, shows
from dalle_cli.stores.files import write_json
from dalle_cli.views.sample_sheet import sample_sheet
from quality_parts.chain import Chain, run_dalle
from quality_parts.datasets import READERS, SETTINGS, DataSet, unpack
from quality_parts.dense import beside_our_prior
from quality_parts.judges import Head, Judge, Right, distances, fit_head
from quality_parts.report import describe_machine, render
from quality_parts.retrieval import share_found, train_judge
from quality_parts.sweep import sweep

ROOT = Path(__file__).parents[3]
SWEPT_CAPTIONS = 100
SHEET_CAPTIONS = 12


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="scripts/bench/quality", description=__doc__)
    parser.add_argument("data", choices=sorted(READERS), help="data set")
    parser.add_argument("--source", type=Path, required=True, help="place of the data set's files")
    parser.add_argument("--system", choices=["dalle", "dalle-pytorch"], default="dalle", help="system to train (dalle)")
    parser.add_argument("--minutes", type=float, default=45, help="budget of training, over all stages (45)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the chain")
    parser.add_argument("--captions", type=int, default=200, help="number of held-out captions to draw (200)")
    parser.add_argument("--n", type=int, default=32, help="samples of each caption (32)")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "own-data.yaml", help="recipe of the chain")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="also train a plain dense transformer on the chain's tokens, as long as the prior",
    )
    parser.add_argument("--sweep", action="store_true", help="also try sampling settings on captions of the validation")
    parser.add_argument("--out", type=Path, help="folder of the runs (runs/quality/SYSTEM-DATA-MINUTES-SEED)")
    options = parser.parse_args()
    name = f"{options.system}-{options.data}-{options.minutes:g}-{options.seed}"
    out = (options.out or Path("runs/quality") / name).absolute()
    out.mkdir(parents=True, exist_ok=True)
    data = unpack(options.data, options.source, out.parent / options.data)
    captions = draw_captions(data, options.captions, out)
    changes = [*SETTINGS.get(options.data, []), *options.set]
    recipe = load_recipe(options.recipe, changes)
    if options.system == "dalle":
        chain = Chain(options.recipe, data, out, options.seed, changes)
        chain.train(options.minutes)
        settings, seconds, pictures = chain.changes, chain.seconds, draw_pictures(chain, data, captions, options.n)
    else:
        from quality_parts.peer import Peer

        peer = Peer(data, recipe.image_size, recipe.tokenizer, options.seed)
        peer.train(options.minutes)
        settings, seconds, pictures = peer.settings, peer.seconds, peer.draw(captions, options.n, out / "pictures")
    found = {
        "system": options.system,
        "data": options.data,
        "minutes": options.minutes,
        "seed": options.seed,
        "n": options.n,
        "command": " ".join(["scripts/bench/quality", *sys.argv[1:]]),
        "machine": describe_machine(),
        "settings": settings,
        "seconds": seconds,
        "psnr": pictures["psnr"],
        **score(data, captions, pictures, recipe.image_size),
        **find_captions(data, options.recipe, captions, pictures),
    }
    if options.sweep and options.system == "dalle":
        judge = Judge(recipe.image_size)
        found["sweep"] = sweep(out, data, judge, fit_heads(judge, data), SWEPT_CAPTIONS)
    if options.dense and options.system == "dalle":
        found["dense"] = beside_our_prior(out, seconds["train-prior"], options.seed)
    write_json(out / "quality.json", found)
    title = f"{options.system}: captions of held-out pictures, {options.minutes:g} minutes of training"
    write_sheet(captions, pictures, recipe.image_size, title, out / "contact-sheet.png")
    print(render([found]))


def draw_captions(data: DataSet, count: int, out: Path) -> list[dict[str, Any]]:
    """Draw held-out pictures, each with a caption that no other has; write them as prompts for dalle sample."""
    rng, rows, captions = random.Random(0), data.rows(data.held_out), []
    used: set[str] = set()
    for row in rng.sample(rows, len(rows)):
        free = [caption for caption in row["captions"] if caption not in used]
        if free and len(captions) < count:
            captions.append({**row, "id": row["key"], "caption": rng.choice(free)})
            used.add(captions[-1]["caption"])
    lines = [json.dumps({"id": row["id"], "caption": row["caption"]}) for row in captions]
    (out / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return captions


def draw_pictures(chain: Chain, data: DataSet, captions: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """Reconstruct the captions' true pictures, and draw ``n`` samples of each caption, ranked by the chain's CLIP."""
    run = chain.run
    rebuilt, samples, ranked = run / "rebuilt.jsonl", run / "samples.jsonl", run / "ranked.jsonl"
    real = [data.root / row["path"] for row in captions]
    images = [str(path) for path in real]
    run_dalle(
        "reconstruct", "--dvae", str(run / "dvae"), "--out", str(run / "rebuilt"), "--alone", *images, stdout=rebuilt
    )
    run_dalle("sample", str(run / "prior"), "--captions", str(run / "captions.jsonl"), "--n", str(n), stdout=samples)
    run_dalle("rerank", str(samples), stdout=ranked)
    lines = [json.loads(line) for line in rebuilt.read_text().splitlines()]
    by_caption: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, ranked.read_text().splitlines()):
        by_caption.setdefault(line["id"], []).append(line)
    return {
        "real": real,
        "rebuilt": [Path(line["png"]) for line in lines],
        "psnr": sum(line["psnr"] for line in lines) / len(lines),
        "ranked": [sorted(by_caption[row["id"]], key=lambda line: line["rank"]) for row in captions],
    }


def write_sheet(
    captions: list[dict[str, Any]], pictures: dict[str, Any], image_size: int, title: str, out: Path
) -> None:
    """Write a contact sheet of the first captions: the best sample, the true picture, and other samples."""
    first = captions[:SHEET_CAPTIONS]
    pools = [Pool(row["caption"], tuple(lines)) for row, lines in zip(first, pictures["ranked"], strict=False)]
    true = {
        row["caption"]: eval_crop(decode_image(path.read_bytes()), image_size)
        for row, path in zip(first, pictures["real"], strict=False)
    }
    sample_sheet(pools, title, true).save(out)


def score(data: DataSet, captions: list[dict[str, Any]], pictures: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Return the judges' figures of real pictures, reconstructions and samples."""
    judge = Judge(image_size)
    heads = fit_heads(judge, data)
    ranked = pictures["ranked"]
    files = [Path(line["png"]) for lines in ranked for line in lines]
    real, rebuilt, drawn = (judge.features(paths) for paths in (pictures["real"], pictures["rebuilt"], files))
    n = len(ranked[0])
    first = [i * n + next(k for k, line in enumerate(lines) if line["index"] == 0) for i, lines in enumerate(ranked)]
    best = [i * n for i in range(len(ranked))]
    drawn_keys = {row["key"] for row in captions}
    rest = [row for row in data.rows(data.held_out) if row["key"] not in drawn_keys]
    others = judge.features([data.root / row["path"] for row in rest])
    found: dict[str, Any] = {"right": {}, "distances": {}}
    for name, head in heads.items():
        wanted = [row["labels"][name] for row in captions]
        guesses = head.predict(drawn)
        commonest = max(set(wanted), key=wanted.count)
        found["right"][name] = {
            "real": _right(head, real, wanted),
            "rebuilt": _right(head, rebuilt, wanted),
            "single": asdict(Right.of([guesses[i] == label for i, label in zip(first, wanted, strict=True)])),
            "best": asdict(Right.of([guesses[i] == label for i, label in zip(best, wanted, strict=True)])),
            "any": asdict(Right.of([label in guesses[i : i + n] for i, label in zip(best, wanted, strict=True)])),
            "mean": asdict(Right.of([guess == wanted[i // n] for i, guess in enumerate(guesses)])),
            "commonest": asdict(Right.of([label == commonest for label in wanted])),
        }
    found["right"] |= score_shapes(captions, pictures)
    for name, rows in (("real", real), ("rebuilt", rebuilt), ("single", drawn[first]), ("best", drawn[best])):
        found["distances"][name] = distances(rows, others)
    return found


def score_shapes(captions: list[dict[str, Any]], pictures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by group of captions how often the oracle of the shapes world finds exactly what the caption says.

    Captions of other data sets have no such figures.
    """
    claims = [claim_of(row["caption"]) for row in captions]
    hits: dict[str, dict[str, list[bool]]] = {}
    for i, claim in enumerate(claims):
        if claim is not None:
            group = hits.setdefault(f"scene, {group_of(claim)}", {})
            ranked = pictures["ranked"][i]
            right = [shows(claim, load_picture(line)) for line in ranked]
            first = next(k for k, line in enumerate(ranked) if line["index"] == 0)
            files = {name: pictures[name][i] for name in ("real", "rebuilt")}
            one = {name: shows(claim, read_picture(file, "draw it again")) for name, file in files.items()}
            one |= {"single": right[first], "best": right[0], "any": any(right)}
            for name, hit in one.items():
                group.setdefault(name, []).append(hit)
            group.setdefault("mean", []).extend(right)
    return {group: {name: asdict(Right.of(values)) for name, values in found.items()} for group, found in hits.items()}


def find_captions(
    data: DataSet, recipe: Path, captions: list[dict[str, Any]], pictures: dict[str, Any]
) -> dict[str, Any]:
    """Return how often the judge of captions finds a picture's own caption among all drawn ones, first or in five."""
    judge, texts = train_judge(data, recipe, captions), [row["caption"] for row in captions]
    single = [next(line for line in lines if line["index"] == 0) for lines in pictures["ranked"]]
    files = {
        "real": pictures["real"],
        "rebuilt": pictures["rebuilt"],
        "single": [Path(line["png"]) for line in single],
        "best": [Path(lines[0]["png"]) for lines in pictures["ranked"]],
    }
    return {
        key: {name: asdict(share_found(judge, paths, texts, among)) for name, paths in files.items()}
        for key, among in (("found", 1), ("found_in_5", 5))
    }


def fit_heads(judge: Judge, data: DataSet) -> dict[str, Head]:
    """Fit a classifier to each label of the real training pictures, and to their mirror images."""
    rows = data.rows(data.train)
    names = list(rows[0]["labels"])
    if not names:
        return {}
    cache = data.root / f"judge-{judge.image_size}.pt"
    files = [data.root / row["path"] for row in rows]
    if cache.is_file():
        features = torch.load(cache, weights_only=True)
    else:
        features = torch.cat([judge.features(files), judge.features(files, mirrored=True)])
        torch.save(features, cache)
    return {name: fit_head(features, [row["labels"][name] for row in rows] * 2) for name in names}


def _right(head: Head, features: torch.Tensor, wanted: Sequence[str]) -> dict[str, float]:
    return asdict(Right.of([a == b for a, b in zip(head.predict(features), wanted, strict=True)]))


if __name__ == "__main__":
    main()
