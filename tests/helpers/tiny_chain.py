"""A whole chain of the smallest models on a few shapes, for tests that need artifacts of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from dalle_cli.clip.rerank import printed, rerank
from dalle_cli.clip.scoring import load_scorer
from dalle_cli.clip.train import train_clip
from dalle_cli.config.load import load_recipe
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.data.captions import source_captions
from dalle_cli.data.open_source import open_source
from dalle_cli.dvae.encode import encode_source
from dalle_cli.dvae.train import train_dvae
from dalle_cli.prior.train import train_prior
from dalle_cli.sampling.request import SampleRequest
from dalle_cli.sampling.sampler import Sampler
from dalle_cli.shapes.world import make_shapes
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.text.bpe import train_bpe
from dalle_cli.text.tokenize import tokenize_source

SEEN, HELD_OUT = "a large red tee above a small blue square", "a large red ell"
ROWS, SAMPLES = 40, 4


@dataclass(frozen=True)
class TinyChain:
    recipe_file: Path
    recipe: Recipe
    places: RunFolders
    ranked: Path


def write_recipe(folder: Path) -> Path:
    training = {"updates": 2, "batch_size": 4, "workers": 0, "log_every": 1, "validation_samples": 8}
    recipe = {
        "name": "tiny",
        "description": "the smallest <chain>",
        "run": str(folder / "run"),
        "image_size": 32,
        "data": {"train": str(folder / "shapes" / "train"), "holdout": 0.3},
        "tokenizer": {"vocab_size": 300, "text_length": 48},
        "dvae": {"model": {"n_hid": 8, "n_init": 4, "codebook_size": 16, "codebook_std": 0.5}, "training": training},
        "prior": {
            "model": {"layers": 2, "heads": 2, "d_head": 8, "d_model": 16, "grid": 4},
            "training": training,
        },
        "clip": {
            "model": {"embed_dim": 8, "patch_size": 8, "vision_width": 8, "vision_layers": 1, "text_width": 8,
                      "text_layers": 1, "head_width": 8},
            "training": training,
        },
        "sampling": {"n": SAMPLES},
    }  # fmt: skip
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def build_chain(folder: Path) -> TinyChain:
    """Run every stage, and sample and rerank two captions; it takes a few seconds."""
    make_shapes(folder / "shapes", n=ROWS, test_n=2, seed=0, size=32)
    file = write_recipe(folder)
    recipe = load_recipe(file)
    places, source = RunFolders(Path(recipe.run)), open_source(str(recipe.data.train))
    tokenizer = train_bpe(source_captions(source), recipe.tokenizer, places.tokenizer)
    tokenize_source(recipe, source, tokenizer, places.tokens)
    dvae = train_dvae(recipe, source, places.dvae)
    encode_source(recipe, source, dvae, places.tokens)
    prior = train_prior(recipe, places.tokens, places.prior)
    train_clip(recipe, source, places.tokens, places.clip)
    request = SampleRequest([SEEN, HELD_OUT], recipe.sampling, seed=0)
    lines = list(Sampler(prior, open_checkpoint(places.dvae), tokenizer).run(request, places.samples / "one"))
    scorer = load_scorer(None, None, None, beside=Path(lines[0]["png"]))
    ranked = places.root / "ranked.jsonl"
    ranked.write_text("".join(f"{printed(line)}\n" for pool in rerank(lines, scorer) for line in pool))
    return TinyChain(file, recipe, places, ranked)
