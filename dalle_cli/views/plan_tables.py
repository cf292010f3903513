"""Tables of ``dalle plan`` and of a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dalle_cli.views.tables import grid_table, number, pairs_table, print_tables, sharding_text, size

if TYPE_CHECKING:
    from dalle_cli.planning.budget import StageTime
    from dalle_cli.planning.data_path import DataPath
    from dalle_cli.planning.plan import Plan
    from dalle_cli.planning.this_machine import Start
    from dalle_cli.planning.traffic import CompressionRow


def render_plan(plan: Plan, console: Console, start: Start | None = None, measured: Sequence[StageTime] = ()) -> None:
    """Print a plan and, for a dry run, the point from which training would start; ``measured`` are times of stages."""
    tables = [_overview(plan), _parts(plan), _peaks(plan), *_traffic(plan), *_measured(measured), _time(plan)]
    print_tables(console, [*tables, _assumptions(plan), *([] if start is None else [_start(start)])])


def render_compression(rows: Sequence[CompressionRow], console: Console) -> None:
    """Print how much PowerSGD saves, recipe by recipe."""
    columns = ["recipe", "parameters", "d_model", "rank", "paper", "shards here", "all bytes"]
    cells = [
        [
            row.recipe,
            f"{row.effective_parameters / 1e9:.2f}e9",
            row.d_model,
            row.rank,
            *(f"{share:.1%}" for share in (row.paper, row.shards, row.bytes)),
        ]
        for row in rows
    ]
    notes = [
        ("parameters", "effective ones, in the resblocks' matrices"),
        ("paper", "the closed form of section 2.5, 1 - 5r/(8d): matrices split along their longer side among 8 GPUs"),
        ("shards here", "values of the resblocks' matrices, split likewise; query, key and value are one matrix"),
        (
            "all bytes",
            "bytes of all gradients: factors are sent in 16 bit if gradients are, embeddings and unembeddings whole in "
            "32 bit",
        ),
    ]
    tables = [grid_table("Share of gradients that PowerSGD saves between machines", columns, cells, right=range(1, 7))]
    print_tables(console, [*tables, pairs_table("Columns", notes)])


def render_data_path(path: DataPath, console: Console) -> None:
    """Print the steps of a data path, and what was assumed."""
    columns = ["step", "each", "core-hours", "hours", "bytes", "files"]
    rows = [
        [
            step.name,
            _short(step.microseconds),
            *(f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}" for hours in (step.hours, step.elapsed)),
            size(step.bytes) if step.bytes else "",
            f"{step.files:,}" if step.files else "",
        ]
        for step in path.steps
    ]
    notes = [
        ("each", "measured just now on this machine, on random pictures and captions of the recipe's sizes"),
        ("core-hours", f"of one core; of encode-images, of its device ({path.device})"),
        ("hours", f"from start to end: {path.tasks:,} tasks of {path.cores} cores that share evenly"),
        ("compare", "look-ups grow as n^1.1 and checks as n^2, as benchmarks/scale.md found"),
        ("bytes", "before compression; 10,000 pairs a tar, captions of 70 bytes and keys of 12 are assumed"),
        ("start", "every start but the first, which also reads the two arrays that say which rows are usable"),
    ]
    tables = [grid_table(f"Data path of {path.pairs:,} pairs for {path.recipe}", columns, rows, right=range(1, 6))]
    print_tables(console, [*tables, pairs_table("Columns", notes)])


def _short(microseconds: float) -> str:
    """Format a time with three digits, such as ``"1.98 s"`` or ``"42 us"``."""
    for unit, size_of in (("s", 1e6), ("ms", 1e3), ("us", 1.0)):
        if microseconds >= size_of:
            return f"{microseconds / size_of:.3g} {unit}"
    return f"{1000 * microseconds:.3g} ns"


def _overview(plan: Plan) -> Table:
    machines, counts, settings, batch = plan.machines, plan.parameters, plan.settings, plan.batch
    device, devices = ("process", "processes") if machines.on_cpu else ("GPU", "GPUs")
    return pairs_table(
        f"Plan for the prior of {plan.recipe}",
        [
            (
                "machines",
                f"{machines.nodes:,} x {machines.gpus} {devices} = {machines.processes:,}, "
                f"{size(machines.memory)} each",
            ),
            ("parameters", number(counts.total)),
            ("  effective", f"{number(counts.effective)}: matrices of the resblocks, 12 d^2 a layer"),
            ("  other", f"{number(counts.other)}: embeddings, unembeddings, biases, gains"),
            ("precision", settings.precision),
            (
                "sharding",
                sharding_text(settings.engine, settings.zero, settings.offload, settings.node_size),
            ),
            ("activations", "recomputed in the backward pass" if settings.checkpoint_resblocks else "kept"),
            ("PowerSGD", f"rank {settings.powersgd_rank}" if settings.powersgd_rank else "none"),
            (
                "batch",
                f"{batch.samples:,} samples of {batch.tokens_a_sample:,} tokens, {batch.a_process:,} per {device}, in "
                f"micro-batches of {batch.micro_batch:,}",
            ),
        ],
    )


def _parts(plan: Plan) -> Table:
    rows = [
        (
            name,
            size(part.in_16) if part.in_16 else "",
            size(part.in_32) if part.in_32 else "",
            size(part.whole),
            part.shards,
            size(part.each),
            {"device": "", "cpu": "host", "nvme": "disk"}[part.place],
        )
        for name, part in plan.memory.parts.items()
    ]
    device = "each" if plan.machines.on_cpu else "per GPU"
    columns = ["", "16 bit", "32 bit", "whole", "shards", device, "on"]
    return grid_table("Memory that stays from update to update", columns, rows, right=range(1, 6))


def _peaks(plan: Plan) -> Table:
    memory, change = plan.memory, plan.change
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    rows: list[tuple[str, Any]] = [
        ("activations", f"{size(memory.activations_kept)} kept from forward to backward pass"),
        *((phase, size(peak)) for phase, peak in memory.phases.items()),
        ("peak", f"{size(memory.peak)} in {memory.peak_phase}, of {size(memory.usable)} usable: {verdict}"),
        ("on the host", f"{size(memory.host_a_machine)} per machine" if memory.host_a_machine else None),
        ("on its disk", f"{size(memory.disk_a_machine)} per machine" if memory.disk_a_machine else None),
    ]
    if change is not None:
        other = change.gpus_per_node != plan.machines.gpus
        options = [f"--gpus-per-node {change.gpus_per_node}"] if other else []
        rows.append(("fits with" if change.fits else "comes closest with", "\n".join([*options, *change.set])))
        rows.append(("  then", f"{size(change.peak)} in {change.peak_phase}"))
        if change.host_a_machine:
            rows.append(("  on the host", f"{size(change.host_a_machine)} per machine"))
    return pairs_table(f"Peak memory per {'process' if plan.machines.on_cpu else 'GPU'}", rows)


def _traffic(plan: Plan) -> list[Table]:
    traffic = plan.between_machines
    if traffic is None:
        return []
    handed, link, seconds = traffic.a_process, traffic.a_machine_on_the_link, traffic.seconds
    rows = [
        (name, size(of_process), size(of_machine), "" if time is None else f"{time:.2f} s")
        for name, of_process, of_machine, time in (
            ("gradients whole", handed.whole, link.whole, seconds.whole),
            ("under the recipe", handed.sent, link.sent, seconds.sent),
        )
    ]
    device = "process" if plan.machines.on_cpu else "GPU"
    columns = ["", f"sent per {device}", "on each machine's link", "time"]
    title = f"Traffic between machines per update; PowerSGD saves {traffic.compression:.1%} of the bytes"
    return [grid_table(title, columns, rows, right=range(1, 4))]


def _measured(times: Sequence[StageTime]) -> list[Table]:
    """Return a table of the stages' training on this machine; none if nothing was measured."""
    if not times:
        return []
    rows = [
        (time.kind, f"{time.updates:,}", f"{time.seconds:.3g} s", _duration(time.hours)) if time.seconds is not None
        else (time.kind, f"{time.updates:,}", "", "too large to be timed here")
        for time in times
    ]  # fmt: skip
    known = [time.hours for time in times if time.seconds is not None]
    whole = [("all", "", "", _duration(sum(known)))] if len(known) == len(times) else []
    columns = ["training of", "updates", "an update", "in all"]
    return [grid_table("Time on this machine, by updates timed just now", columns, [*rows, *whole], right=range(1, 4))]


def _duration(hours: float) -> str:
    """Format a time, such as ``"11 min"``, ``"3.2 h"`` or ``"45 days"``."""
    if hours < 1.5:
        return f"{60 * hours:.2g} min"
    return f"{hours:.2g} h" if hours < 48 else f"{hours / 24:,.0f} days"


def _time(plan: Plan) -> Table:
    time, checkpoint = plan.time, plan.checkpoint
    rows: list[tuple[str, Any]] = []
    if time is not None:
        rows = [
            ("model FLOPs", f"{time.model_flops:.4g} per update, and {time.recomputed_flops:.4g} recomputed"),
            ("update", f"{time.step_seconds:.3g} s, of which {time.compute_seconds:.3g} s are computation"),
            ("tokens", f"{time.tokens_per_second:,.0f} per second"),
            ("MFU", f"{time.mfu:.1%}"),
            ("training", f"{time.updates:,} updates: {time.hours / 24:,.1f} days, {time.gpu_hours:,.0f} GPU hours"),
            ("cost", f"{time.cost:,.0f}" if time.cost is not None else None),
        ]
    own = f", and {size(checkpoint.each_process)} of each process" if checkpoint.each_process else ""
    share = "" if checkpoint.share is None else f": {checkpoint.share:.2%} of the time"
    rows += [
        ("checkpoint", f"{size(checkpoint.bytes)}: {size(checkpoint.model)} of the model{own}"),
        ("  saving it", f"{checkpoint.seconds:,.3g} s every {checkpoint.every_updates:,} updates{share}"),
    ]
    return pairs_table("Checkpoints" if time is None else "Time", rows)


def _start(start: Start) -> Table:
    rows = start.rows
    return pairs_table(
        "Start on this machine",
        [
            ("process", f"{start.rank} of {start.ranks:,}"),
            ("token store", start.store),
            (
                "  rows",
                "not there yet" if rows is None else f"{rows.training:,} for training, {rows.held_out:,} held out",
            ),
            ("run", start.out),
            ("  resumes from", start.resumes_from),
        ],
    )


def _assumptions(plan: Plan) -> Table:
    return pairs_table("Assumptions", [("-", text) for text in plan.assumptions])
