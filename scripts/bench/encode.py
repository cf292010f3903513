#!/usr/bin/env python3
"""Compare the speed of `dalle encode-images` with that of its bare encoder.

Measures, by turns and in one process, the encoder on batches that lie in memory, and the whole pipeline (reading,
decoding, cutting, encoding, writing the token store), and prints their medians and ratio. Run it in the environment
that scripts/venv makes:

    .venv/bin/python scripts/bench/encode.py recipes/quickstart.yaml --data runs/quickstart/shapes/train
    .venv/bin/python scripts/bench/encode.py --dvae runs/quickstart/dvae --data photos --json

A recipe stands for its dVAE with initial weights, which are as fast as trained ones. The source is begun again where
it is too short for --seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle_cli.config.load import load_recipe
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import PictureBlock, consecutive_pictures
from dalle_cli.data.source import Source
from dalle_cli.distributed.device import choose_device, limit_threads
from dalle_cli.dvae.encode import BLOCK, encode_into, encode_pictures
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.tokens import PartWriter

IN_MEMORY = 8
"""Batches that the bare encoder goes round."""


@dataclass
class Repeated:
    """A source of any number of samples: ``source``, from its beginning again at its end."""

    source: Source
    samples: int

    def __len__(self) -> int:
        return self.samples

    def key(self, i: int) -> str:
        return f"{i // len(self.source)}/{self.source.key(i % len(self.source))}"

    def image_bytes(self, i: int) -> bytes:
        return self.source.image_bytes(i % len(self.source))


def measure(work: Callable[[], None]) -> dict[str, float]:
    """Seconds on the clock, and of all cores by this process and the workers that it waited for.

    It begins with as little memory as a new process, or starting workers would have what is free copied to them.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    cpu_before, before = cpu(), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - before, "cpu_seconds": cpu() - cpu_before}


def main() -> None:
    """Parse the command line, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path)
    parser.add_argument("--dvae", type=Path, help="a dVAE checkpoint or its run, instead of a recipe")
    parser.add_argument("--data", help="source of pictures [data.train]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each [5]")
    parser.add_argument("--seconds", type=float, default=10, help="length of one measurement [10]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args()
    if (given.recipe is None) == (given.dvae is None):
        parser.error("give a recipe or --dvae")
    try:
        if given.dvae is None:
            recipe = load_recipe(given.recipe, given.set)
            model = DVAE(recipe.dvae.model, seed=recipe.seed).to(memory_format=torch.channels_last)
            model = model.eval().requires_grad_(False)
        else:
            checkpoint = open_checkpoint(given.dvae, "dvae")
            recipe = load_recipe(checkpoint.path / "recipe.yaml", given.set)
            model = load_dvae(checkpoint)
        if (spec := given.data or recipe.data.train) is None:
            parser.error("the recipe names no pictures: give --data")
        source = open_source(spec)
    except UserError as error:
        parser.exit(2, f"encode: {error}\n")

    limit_threads(recipe)
    device = choose_device()
    model.to(device)
    eps, workers = recipe.dvae.objective.logit_laplace_eps, recipe.dvae.training.workers

    def blocks(samples: int, workers: int) -> Iterator[PictureBlock]:
        return consecutive_pictures(
            Repeated(source, samples),
            range(samples),
            block=BLOCK,
            image_size=recipe.image_size,
            data=recipe.data,
            workers=workers,
            pinned=device.type == "cuda",
        )

    memory = [block.pictures.clone() for block in blocks(IN_MEMORY * BLOCK, 0)]

    def bare(count: int) -> None:
        for pictures in itertools.islice(itertools.cycle(memory), count):
            encode_pictures(model, pictures.to(device, non_blocking=True), eps)
        if device.type == "cuda":
            torch.cuda.synchronize()

    bare(1)  # warms up
    once = measure(lambda: bare(1))["seconds"]
    count = max(2, round(given.seconds / once))

    def pipeline() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            writer = PartWriter(Path(folder) / "tokens.zarr", "image", {})
            encode_into(writer, model, blocks(count * BLOCK, workers), eps, count * BLOCK)
            writer.finish()

    rounds = [(measure(lambda: bare(count)), measure(pipeline)) for _ in range(given.rounds)]
    found: dict[str, object] = {
        "pictures": count * BLOCK,
        "image_size": recipe.image_size,
        "n_hid": recipe.dvae.model.n_hid,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "workers": workers,
    }
    for unit, name in (("seconds", "pictures_per_second"), ("cpu_seconds", "pictures_per_cpu_second")):
        encoder, pipe = (statistics.median(times[which][unit] for times in rounds) for which in (0, 1))
        found[f"encoder_{name}"] = round(count * BLOCK / encoder, 2)
        found[f"pipeline_{name}"] = round(count * BLOCK / pipe, 2)
        found["ratio" if unit == "seconds" else "cpu_ratio"] = round(encoder / pipe, 4)
    if given.json:
        print(json.dumps(found))
        return
    print(f"{found['device']}, {found['threads']} threads and {workers} workers, medians of {given.rounds}")
    print(f"{found['pictures']} pictures of {recipe.image_size} x {recipe.image_size}, n_hid {found['n_hid']}")
    print(f"the encoder alone  {found['encoder_pictures_per_second']:>10} pictures/s")
    print(f"encode-images      {found['pipeline_pictures_per_second']:>10} pictures/s")
    print(f"ratio              {found['ratio']:>10}   (of CPU time: {found['cpu_ratio']})")


if __name__ == "__main__":
    main()
