"""Time an update of the quickstart's prior: its share of the matmul peak, and how long it waits for tokens."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.device import fast_matmul
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.loop import Run
from dalle_cli.training.state import TrainingState
from prior_parts.timing import SIDE, square_matmul

Log = Callable[[str], None]
RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
ROWS, UPDATES = 20_000, 200
MATMUL_EVERY = 10
"""Updates between two timings of the matmul peak."""
WAIT_GOAL = 0.01
"""Largest share of the time that training should wait for tokens."""


def measure(log: Log, updates: int = UPDATES) -> dict[str, Any]:
    """Return medians over ``updates`` updates of the training loop, on a store of random tokens."""
    recipe = load_recipe(RECIPE, ["prior.precision=fp32"])
    stage = recipe.prior
    matmul = square_matmul(torch.float32, "cpu")
    waits, taken, matmuls = [], [], []
    with tempfile.TemporaryDirectory() as folder, fast_matmul() as library:
        task = PriorTask(recipe, _write_tokens(Path(folder) / "tokens", recipe), build_prior(recipe))
        run = Run(task, recipe, Path(folder))
        state = TrainingState(run.engine, stage, task.decayed())
        batches = task.batches(0, updates)
        with FlopCounterMode(display=False) as counter:
            run.update(state, next(batches), 0, 1e-4)
        for step in range(1, updates):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter()
            run.update(state, batch, step, 1e-4)
            state.update_ema(step)
            done = time.perf_counter()
            waits.append(waited - began)
            taken.append(done - waited)
            if step % MATMUL_EVERY == 0:
                began = time.perf_counter()
                matmul()
                matmuls.append(time.perf_counter() - began)
    update, rate = statistics.median(taken), 2 * SIDE**3 / statistics.median(matmuls)
    row = {
        "name": f"update, {library}",
        "ms": update * 1e3,
        "wait_ms": statistics.median(waits) * 1e3,
        "wait_share": sum(waits) / (sum(taken) + sum(waits)),
        "wait_goal": WAIT_GOAL,
        "gflops": counter.get_total_flops() / update / 1e9,
        "share_of_peak": counter.get_total_flops() / update / rate,
    }
    log(f"quickstart  {row['ms']:.1f} ms an update, and {row['wait_share']:.3%} of the time waiting for tokens")
    sizes = {**stage.model.model_dump(), "batch": stage.training.batch_size, "updates": updates}
    return {"sizes": sizes, "rows": [row], "ratios": []}


def _write_tokens(path: Path, recipe: Recipe) -> TokenReader:
    """Write a store of random tokens as large as the quickstart's."""
    rng = np.random.default_rng(0)
    length, vocab, codes = recipe.tokenizer.text_length, recipe.tokenizer.vocab_size, recipe.dvae.model.codebook_size
    with PartWriter(path, "text", {"text_length": length, "vocab_size": vocab, "tokenizer": ""}, ROWS) as text:
        while rows := text.todo[: text.rows_per_shard]:
            keys, n = [f"{row:09d}" for row in rows], len(rows)
            arrays = {
                "text": rng.integers(vocab, size=(n, length)).astype(np.uint16),
                "text_length": rng.integers(4, length + 1, size=n).astype(np.uint16),
                "caption": np.array([""] * n, dtype=object),
            }
            text.append(keys, arrays, {})
        text.finish()
    with PartWriter(path, "image", {"grid": recipe.grid, "codebook_size": codes, "dvae": ""}, ROWS) as image:
        while rows := image.todo[: image.rows_per_shard]:
            keys, n = [f"{row:09d}" for row in rows], len(rows)
            shape = (n, recipe.grid, recipe.grid)
            arrays = {"image": rng.integers(codes, size=shape).astype(np.uint16), "image_ok": np.ones(n, np.uint8)}
            image.append(keys, arrays, {})
        image.finish()
    return TokenReader(path)
