#!/usr/bin/env python3
"""Compare the two gradient estimators of a small dVAE: Gumbel-softmax, and REINFORCE with a leave-one-out baseline.

    .venv/bin/python scripts/studies/dvae.py                  # the shapes world; takes some minutes on one core
    .venv/bin/python scripts/studies/dvae.py --data photos --updates 20000  # your own pictures

The script trains the same model from the same initial weights on the same batches with each estimator. It prints the
validations on held-out pictures with the EMA weights: the ELBO (beta = 1) in nats per pixel value, and the other
figures with the most likely codes. A killed study resumes when it is run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dalle_cli.config.schema import Recipe
from dalle_cli.data.open_source import open_source
from dalle_cli.dvae.train import train_dvae
from dalle_cli.shapes.world import make_shapes

ESTIMATORS = ("gumbel", "reinforce")
COLUMNS = {"elbo": "ELBO", "psnr": "PSNR", "ssim": "SSIM", "mse": "MSE", "codebook_perplexity": "perplexity",
           "dead_codes": "dead"}  # fmt: skip


def study_recipe(estimator: str, source: str, options: argparse.Namespace) -> Recipe:
    """Return the recipe of a dVAE with 32 codes for 32 x 32 pictures, with the quickstart's schedules."""
    updates = options.updates
    objective = {
        "estimator": estimator,
        "reinforce_samples": 8,
        "kl_weight": {"start": 5.0, "end": 0.3, "updates": updates // 2},
        "marginal_kl_weight": options.marginal_kl_weight,
        "temperature": {"start": 1.0, "end": 0.1, "updates": 2 * updates // 3},
        "ln_b_floor": -1.0,
    }
    training = {
        "updates": updates, "batch_size": 16, "ema_decay": 0.99, "log_every": max(1, updates // 100),
        "validate_every": max(1, updates // options.rows), "save_every": max(1, updates // options.rows),
        "validation_samples": 256,
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": f"dvae-{estimator}",
            "image_size": 32,
            "threads": 1,
            "data": {"train": source, "holdout": 0.1, "crop": False, "flip": False},
            "dvae": {
                "model": {"n_hid": 16, "n_init": 32, "blocks_per_group": 1, "codebook_size": 32},
                "objective": objective,
                "learning_rate": {"peak": 3e-3, "warmup_updates": min(100, updates // 10), "final": 6e-5},
                "adam": {"clip_norm": 1.0},
                "training": training,
            },
            "prior": {"model": {"grid": 4}},
        }
    )


def validations(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl that hold validations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_elbo" in line]


def main() -> None:
    """Parse the command line, run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="SOURCE", help="source of pictures [the shapes world]")
    parser.add_argument("--updates", type=int, default=4000, help="updates of each run [4000]")
    parser.add_argument("--rows", type=int, default=8, help="validations of each run [8]")
    parser.add_argument(
        "--marginal-kl-weight",
        type=float,
        default=50.0,
        help="dvae.objective.marginal_kl_weight, which keeps codes in use; 0 is the paper's ELBO [50]",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/dvae-study"), help="folder of the runs [runs/dvae-study]"
    )
    parser.add_argument("--json", action="store_true", help="print the validations as JSON")
    options = parser.parse_args()
    if options.data is None and not (options.out / "shapes").exists():
        make_shapes(options.out / "shapes", n=4000, test_n=1, seed=0, size=32)
    source = options.data or str(options.out / "shapes" / "train")
    found = {}
    for estimator in ESTIMATORS:
        recipe = study_recipe(estimator, source, options)
        train_dvae(recipe, open_source(source), options.out / estimator)
        found[estimator] = validations(options.out / estimator)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'estimator':10} {'updates':>8}" + "".join(f"{title:>11}" for title in COLUMNS.values()))
    for estimator, lines in found.items():
        for line in lines:
            values = (f"{line[f'val_{name}']:11.4g}" for name in COLUMNS)
            print(f"{estimator:10} {line['step']:8}" + "".join(values))


if __name__ == "__main__":
    main()
