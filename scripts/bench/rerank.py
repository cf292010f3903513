#!/usr/bin/env python3
"""Compare the speed of `dalle rerank` with that of its bare CLIP.

Measures, by turns and in one process, open_clip's image encoder on batches of prepared pictures that lie in memory, and
reranking whole (reading lines, reading and decoding PNGs, preparing them, measuring, ranking), and prints their medians
and ratio. Run it in the environment that scripts/venv makes:

    .venv/bin/python scripts/bench/rerank.py --model ViT-B-32
    .venv/bin/python scripts/bench/rerank.py --clip runs/quickstart/clip --manifest runs/quickstart/samples.jsonl --json

An open_clip model has random weights, which are as fast as trained ones. Without --manifest, random pictures are
written as PNG files of --size, which are as slow to decode as any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter

from dalle_cli.clip.load import load_scorer
from dalle_cli.clip.rerank import BATCH, Line, read_manifest, rerank
from dalle_cli.clip.scoring import OpenClipScorer, Scorer
from dalle_cli.data.images import decode_image
from dalle_cli.distributed.device import choose_device
from dalle_cli.errors import UserError

PROMPTS = ("a large red circle", "two green squares", "a small blue star above a large yellow triangle")


class RandomOpenClip(OpenClipScorer):
    """One of open_clip's models with random weights and the model's own preparation of pictures."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(name, device=str(device))
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.device, self.name = str(device), f"open_clip {name}, random weights"


def write_pictures(folder: Path, count: int, size: int) -> list[Line]:
    """Smooth noise, which compresses about as photographs do."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        file = folder / f"{index}.png"
        noise.filter(ImageFilter.GaussianBlur(2)).save(file)
        lines.append({"prompt": PROMPTS[index * len(PROMPTS) // count], "png": str(file), "index": index})
    return lines


def measure(work: Callable[[], None]) -> dict[str, float]:
    """Seconds on the clock and of all cores."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    cpu_before, before = cpu(), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - before, "cpu_seconds": cpu() - cpu_before}


def bare_model(scorer: Any, lines: list[Line], batch: int) -> Callable[[], None]:
    """The image encoder alone, on the lines' pictures as prepared batches on the device."""
    device = scorer.model.logit_scale.device
    prepared = [scorer.prepare(np.asarray(decode_image(Path(line["png"]).read_bytes()))) for line in lines]
    batches = [torch.stack(prepared[start : start + batch]).to(device) for start in range(0, len(prepared), batch)]
    if not isinstance(scorer, OpenClipScorer):
        from dalle_cli.clip.model import pixels

        batches = [pixels(pictures) for pictures in batches]

    @torch.inference_mode()
    def run() -> None:
        for pictures in batches:
            scorer.model.encode_image(pictures, normalize=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Parse the command line, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name of an open_clip model [ViT-B-32]")
    parser.add_argument("--clip", help="a run of train-clip instead")
    parser.add_argument("--manifest", type=Path, help="lines of dalle sample")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures written [256]")
    parser.add_argument("--pictures", type=int, default=256, help="pictures of one measurement, at most [256]")
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"[{BATCH}]")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each [5]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args()
    device = choose_device()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if given.manifest is not None:
                with given.manifest.open(encoding="utf-8") as stream:
                    lines = list(islice(read_manifest(stream, str(given.manifest)), given.pictures))
            else:
                lines = write_pictures(Path(folder), given.pictures, given.size)
            scorer: Scorer
            if given.clip is not None:
                scorer = load_scorer(given.clip, None, None, beside=Path(given.clip), device=device)
            else:
                scorer = RandomOpenClip(given.model or "ViT-B-32", device)
            bare = bare_model(scorer, lines, given.batch_size)
        except (OSError, UserError) as error:
            parser.exit(2, f"rerank: {error}\n")
        text = "\n".join(json.dumps(line) for line in lines)

        def whole() -> None:
            read = read_manifest(io.StringIO(text), "lines")
            with contextlib.redirect_stderr(io.StringIO()):
                for _ in rerank(read, scorer, batch=given.batch_size):
                    pass

        bare()  # warms up
        whole()
        rounds = [(measure(bare), measure(whole)) for _ in range(given.rounds)]
    found: dict[str, object] = {
        "scorer": scorer.name,
        "pictures": len(lines),
        "batch_size": given.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    for unit, name in (("seconds", "pictures_per_second"), ("cpu_seconds", "pictures_per_cpu_second")):
        model, reranking = (statistics.median(times[which][unit] for times in rounds) for which in (0, 1))
        found[f"model_{name}"] = round(len(lines) / model, 2)
        found[f"rerank_{name}"] = round(len(lines) / reranking, 2)
        found["ratio" if unit == "seconds" else "cpu_ratio"] = round(model / reranking, 4)
    if given.json:
        print(json.dumps(found))
        return
    print(f"{found['scorer']} on {found['device']}, {found['threads']} threads, medians of {given.rounds}")
    print(f"{found['pictures']} pictures, {given.batch_size} at once")
    print(f"the model alone  {found['model_pictures_per_second']:>10} pictures/s")
    print(f"dalle rerank     {found['rerank_pictures_per_second']:>10} pictures/s")
    print(f"ratio            {found['ratio']:>10}   (of CPU time: {found['cpu_ratio']})")


if __name__ == "__main__":
    main()
