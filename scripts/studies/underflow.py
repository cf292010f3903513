#!/usr/bin/env python3
"""Compare float16 gradients of a deep, narrow prior with float32: with no scale, one scale, and one scale per resblock.

    .venv/bin/python scripts/studies/underflow.py --out runs/underflow
    .venv/bin/python scripts/studies/underflow.py --tokens runs/quickstart/tokens.zarr --layers 24 --updates 500

The script writes training.csv, blocks.csv, study.json and underflow.png into --out and prints a table. It runs on any
CPU, but float16 is slow there. --replicas is the simulated number of data-parallel replicas, by which each divides its
loss; --growth above 1 makes the gradients of the resblocks differ more in size.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from underflow_probe import VARIANTS, Found, Line, Study, run_study, stored_tokens, synthetic_tokens

from dalle_cli.errors import UserError
from dalle_cli.stores.files import write_atomically, write_json
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.views.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, figure_png

COLOURS = dict(zip(VARIANTS, (BLACK, ORANGE, PINK, BLUE, GREEN), strict=True))


def write_study(study: Study, found: Found, out: Path) -> str:
    """Write ``blocks.csv``, ``training.csv``, ``study.json`` and ``underflow.png`` into ``out``.

    Returns:
        A table of the results.
    """
    lines = found.training
    write_json(out / "study.json", asdict(study))
    write_atomically(out / "blocks.csv", _csv(found.blocks))
    training = [{"update": i + 1, "variant": name, **line} for name in VARIANTS for i, line in enumerate(lines[name])]
    write_atomically(out / "training.csv", _csv(training))
    losses = {name: [line["loss"] for line in values] for name, values in lines.items()}
    write_atomically(out / "underflow.png", _figure(losses, found.blocks))
    return _table(lines, found.blocks)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(lines: Mapping[str, Sequence[Line]], rows: Sequence[Mapping[str, Any]]) -> str:
    def text() -> Iterator[str]:
        losses = {name: np.array([line["loss"] for line in lines[name]]) for name in VARIANTS}
        tenth = -(-len(losses["fp32"]) // 10)
        yield f"{'training':<20}{'first loss':>16}{'last tenth':>12}{'mean gap to fp32':>18}{'updates skipped':>17}"
        for name, values in losses.items():
            gap = np.abs(values - losses["fp32"]).mean()
            skipped = sum(line["skipped"] > 0 for line in lines[name])
            yield f"{name:<20}{values[0]:>16.4f}{values[-tenth:].mean():>12.4f}{gap:>18.4f}{skipped:>17}"
        for moment in ("start", "end"):
            yield ""
            yield (
                f"weights at the {moment:<5}{'log2 of scales':>16}{'entering zeroed':>22}{'subnormal':>11}"
                f"{'matrices: zeros':>17}{'error':>9}{'worst':>9}"
            )
            for name in VARIANTS:
                own = [row for row in rows if row["weights"] == moment and row["variant"] == name]
                mean = {key: np.mean([row[key] for row in own]) for key in own[0] if key not in ("weights", "variant")}
                scales = [row["log2_scale"] for row in own]
                worst = max(row["matrix_error"] for row in own)
                yield (
                    f"{name:<20}{f'{min(scales):g} to {max(scales):g}':>16}{mean['lost']:>22.2%}"
                    f"{mean['subnormal']:>11.2%}{mean['matrix_zeros']:>17.2%}{mean['matrix_error']:>9.2%}{worst:>9.2%}"
                )
            exact = [row for row in rows if row["weights"] == moment and row["variant"] == "fp32"]
            middles = [row["entering_log2_p50"] for row in exact]
            yield f"median entering gradient 2^{min(middles):.1f} to 2^{max(middles):.1f} over the resblocks"

    return "\n".join(text())


def _figure(losses: Mapping[str, Sequence[float]], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG of the loss curves and of gradients, scales and errors by resblock at the trained weights."""
    end = [row for row in rows if row["weights"] == "end"]

    def of(name: str, key: str) -> list[float]:
        return [row[key] for row in end if row["variant"] == name]

    with plt.rc_context({"font.size": 8, "axes.grid": True, "grid.color": "#eceef2", "legend.frameon": False}):
        drawn, ((training, exponents), (lost, errors)) = plt.subplots(
            2, 2, figsize=(9, 6.4), dpi=160, constrained_layout=True
        )
        for name, colour in COLOURS.items():
            # The last curve is dashed, so that one it coincides with shows through.
            look = {"color": colour, "linestyle": "--" if name == "scale per resblock" else "-", "linewidth": 1.2}
            training.plot(range(1, len(losses[name]) + 1), losses[name], label=name, **look)
            if name != "fp32":
                lost.plot(of(name, "lost"), label=name, **look)
                errors.plot(of(name, "matrix_error"), label=name, **look)
                exponents.plot(of(name, "log2_scale"), label=f"log2 of scale: {name}", **look)
        blocks = range(len(of("fp32", "lost")))
        exponents.fill_between(blocks, of("fp32", "entering_log2_p05"), of("fp32", "entering_log2_p95"),
                               color=GREY, alpha=0.25, linewidth=0, label="5% to 95% of the gradients")  # fmt: skip
        exponents.plot(of("fp32", "entering_log2_p50"), color=GREY, label="median of the gradients")
        for level, what in ((-14, "smallest normal"), (-24, "smallest subnormal")):
            exponents.axhline(level, color="black", linewidth=0.7, linestyle=":")
            exponents.annotate(f"float16's {what}", (0, level), fontsize=7, xytext=(0, 2), textcoords="offset points")
        training.set(title="training", xlabel="updates", ylabel="loss, nats")
        exponents.set(title="entering gradients (log2) and scales", xlabel="resblock")
        lost.set(title="share of entering gradients that become zero", xlabel="resblock", ylim=(-0.02, 1.02))
        errors.set(title="error of the matrices' gradients", xlabel="resblock", yscale="log")
        for axes in (training, exponents, lost, errors):
            axes.legend(fontsize=6.5)
        return figure_png(drawn)


def main() -> None:
    """Parse the command line, run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/underflow"), help="folder of the results [runs/underflow]"
    )
    parser.add_argument(
        "--tokens", type=Path, help="token store to train on, whose sizes replace those below [synthetic tokens]"
    )
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    for field in fields(Study):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"[{field.default}]",
        )
    given = vars(parser.parse_args())
    out, tokens, threads = (given.pop(name) for name in ("out", "tokens", "threads"))
    if threads:
        torch.set_num_threads(threads)
    study = Study(**given)
    try:
        if tokens is None:
            batch = partial(synthetic_tokens, study)
        else:
            reader = TokenReader(tokens)
            reader.require_complete()
            text, image = reader.part("text").identity, reader.part("image").identity
            study = replace(
                study,
                grid=image["grid"],
                image_vocab=image["codebook_size"],
                text_length=text["text_length"],
                text_vocab=text["vocab_size"],
            )
            batch = stored_tokens(reader, study)
        print(write_study(study, run_study(study, batch), out))
    except UserError as error:
        parser.exit(2, f"underflow: {error}\n")


if __name__ == "__main__":
    main()
