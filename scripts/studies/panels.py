#!/usr/bin/env python3
"""Measure how often the prior draws the right bottom half below a top half that it has never seen (image to image).

    .venv/bin/python scripts/studies/panels.py    # makes the pictures, trains and samples; takes as long as quickstart
    .venv/bin/python scripts/studies/panels.py --set prior.training.updates=6000

Every caption asks for the same shape on the bottom as on the top, changed in one way. The given pictures have an empty
bottom half, and a top half with a (colour, shape) pair that was never on top in training or, for comparison, one that
was. For each kind of change, the script prints the share of samples whose bottom half the oracle finds right. Beside it
stands an upper bound: the share of correct pictures that the oracle still finds right after the dVAE has encoded and
decoded them. The script writes panels.json and panels.png into the run's folder. A killed study resumes when it is run
again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle_cli.config.load import load_recipe
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.data.open_source import open_source
from dalle_cli.dvae.encode import decode_tokens, encode_images, encode_source
from dalle_cli.dvae.train import load_dvae, train_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.train import train_prior
from dalle_cli.sampling.request import Prime, SampleRequest
from dalle_cli.sampling.sampler import Sampler
from dalle_cli.shapes.panels import Panels, bottom_matches, make_panels, random_panels, render_panels
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.files import write_json
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.tokenize import tokenize_source, train_tokenizer
from dalle_cli.views.contact_sheet import Row, contact_sheet

GROUPS = {"unseen tops": "heldout", "seen tops": "seen"}
"""Split of the pairs on top, by the group's name in the table."""


def train_chain(recipe: Recipe, places: RunFolders, pictures: int, test: int) -> Sampler:
    """Run the stages of the chain that are not complete, and return a sampler of its prior."""
    make_panels(places.root / "shapes", pictures, test, recipe.seed, recipe.image_size)
    source = open_source(str(places.root / "shapes" / "train"))
    if not (places.tokenizer / "tokenizer.json").is_file():
        train_tokenizer(recipe, source, places.tokenizer)
    tokenizer = Tokenizer.load(places.tokenizer)
    tokenize_source(recipe, source, tokenizer, places.tokens)
    dvae = train_dvae(recipe, source, places.dvae)
    encode_source(recipe, source, dvae, places.tokens)
    prior = train_prior(recipe, places.tokens, places.prior)
    return Sampler(prior, dvae, tokenizer)


def draw(sampler: Sampler, recipe: Recipe, scenes: Sequence[Panels], folder: Path, seed: int) -> list[dict[str, Any]]:
    """Draw bottom halves below each scene's top half, and return the manifest lines of the samples."""
    folder.mkdir(parents=True, exist_ok=True)
    tops = [folder / f"top-{number:04d}.png" for number in range(len(scenes))]
    for scene, file in zip(scenes, tops, strict=True):
        Image.fromarray(render_panels(scene, recipe.image_size, bottom=False)).save(file)
    captions = [scene.caption for scene in scenes]
    request = SampleRequest(
        captions, recipe.sampling, seed, prime=Prime(tops, recipe.grid // 2, recipe.data.max_pixels)
    )
    return list(sampler.run(request, folder / f"samples-{seed}"))


def after_dvae(checkpoint: Checkpoint, recipe: Recipe, scenes: Sequence[Panels]) -> list[bool]:
    """Return, for each scene, whether its correct picture is still right after the dVAE has encoded and decoded it."""
    dvae, eps = load_dvae(checkpoint), recipe.dvae.objective.logit_laplace_eps
    pictures = torch.from_numpy(np.stack([render_panels(scene, recipe.image_size) for scene in scenes]))
    decoded = decode_tokens(dvae, encode_images(dvae, pictures, eps), eps).numpy()
    return [bottom_matches(s.top, s.change, p) for s, p in zip(scenes, decoded, strict=True)]


def kind(scene: Panels) -> str:
    """Return the kind of change that a scene's caption asks for."""
    return "in another colour" if scene.change.startswith("in ") else scene.change


def table(scenes: Sequence[Panels], right: np.ndarray, ceiling: Sequence[bool]) -> dict[str, dict[str, float]]:
    """Return the shares of right bottoms for each kind of change.

    The error is the standard error over tops, because the samples of one top are not independent.

    Args:
        scenes: Scenes, one for each top.
        right: Whether each sample is right (tops, samples).
        ceiling: Whether each scene's correct picture is right after the dVAE.
    """
    found = {}
    for name in ["all", *dict.fromkeys(kind(scene) for scene in scenes)]:
        chosen = np.array([name in ("all", kind(scene)) for scene in scenes])
        shares = right[chosen].mean(1)
        error = float(shares.std(ddof=1)) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
        through = float(np.array(ceiling)[chosen].mean())
        found[name] = {"tops": len(shares), "right": float(shares.mean()), "error": error, "after_dvae": through}
    return found


def main() -> None:
    """Parse the command line, run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", type=Path, default=Path("recipes/panels.yaml"), help="recipe of the chain [recipes/panels.yaml]"
    )
    parser.add_argument("--pictures", type=int, default=20_000, help="pictures to train on [20000]")
    parser.add_argument("--tops", type=int, default=100, help="top halves of each group [100]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples [0]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.set)
    places = RunFolders(Path(recipe.run))
    sampler = train_chain(recipe, places, options.pictures, options.tops)
    figures, rows = {}, []
    for group, split in GROUPS.items():
        scenes = [random_panels(recipe.seed, split, number) for number in range(options.tops)]
        lines = draw(sampler, recipe, scenes, places.root / "given" / split, options.seed)
        drawn = [np.asarray(Image.open(line["png"])) for line in lines]
        asked = [scenes[line["prompt_index"]] for line in lines]
        judged = [bottom_matches(s.top, s.change, p) for s, p in zip(asked, drawn, strict=True)]
        right = np.array(judged).reshape(len(scenes), recipe.sampling.n)
        figures[group] = table(scenes, right, after_dvae(sampler.dvae_checkpoint, recipe, scenes))
        for number in range(min(8, len(scenes))):
            own = drawn[number * recipe.sampling.n :][: min(6, recipe.sampling.n)]
            given = render_panels(scenes[number], recipe.image_size, bottom=False)
            rows.append(Row(scenes[number].caption, given, own, tag=group))
    write_json(places.root / "panels.json", figures)
    contact_sheet(rows, best_label="given", others_label="drawn below").save(places.root / "panels.png")
    print(f"{'':12} {'change':18} {'tops':>5} {'bottoms right':>16} {'after the dVAE':>15}")
    for group, found in figures.items():
        for name, row in found.items():
            share = f"{100 * row['right']:.1f} ± {100 * row['error']:.1f} %"
            print(f"{group:12} {name:18} {row['tops']:5} {share:>16} {100 * row['after_dvae']:13.1f} %")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"panels: {error}") from None
