"""``dalle plan``'s values as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dalle_cli.views.tables import grid_table, number, pairs_table, print_tables, size


def render_plan(found: dict[str, Any], console: Console) -> None:
    """Print a plan, and what a start would begin with where it is one of a dry run."""
    tables = [_what(found), _parts(found), _phases(found), *_between(found), _time(found), _assumed(found)]
    print_tables(console, [*tables, _start(found["start"])] if "start" in found else tables)


def render_compression(rows: list[dict[str, Any]], console: Console) -> None:
    """Print what PowerSGD saves, recipe by recipe."""
    columns = ["recipe", "effective parameters", "d_model", "rank", "paper, 1 - 5r/(8d)", "shards here", "all bytes"]
    cells = [
        [
            row["recipe"],
            f"{row['effective_parameters'] / 1e9:.2f}e9",
            row["d_model"],
            row["rank"],
            *(f"{row[name]:.1%}" for name in ("paper", "shards", "bytes")),
        ]
        for row in rows
    ]
    notes = [
        ("paper", "the closed form of section 2.4, of matrices split along their longer side among 8 GPUs"),
        ("shards here", "numbers of the factors of this project's shards: consecutive rows, an eighth of each matrix"),
        (
            "all bytes",
            "of all gradients: embeddings and unembeddings cross whole in 32 bit, factors in 16 where gradients are",
        ),
    ]
    tables = [grid_table("Not sent between machines, thanks to PowerSGD", columns, cells, right=range(1, 7))]
    print_tables(console, [*tables, pairs_table("Columns", notes)])


def _what(found: dict[str, Any]) -> Table:
    machines, counts, settings, batch = (found[name] for name in ("machines", "parameters", "settings", "batch"))
    device = "process" if machines["on_cpu"] else "GPU"
    devices = "processes" if machines["on_cpu"] else "GPUs"
    return pairs_table(
        f"Plan for the prior of {found['recipe']}",
        [
            (
                "machines",
                f"{machines['nodes']:,} x {machines['gpus']} {devices} = {machines['processes']:,}, "
                f"{size(machines['memory'])} each",
            ),
            ("parameters", number(counts["total"])),
            ("  effective", f"{number(counts['effective'])}: matrices of the resblocks, 12 d^2 a layer"),
            ("  other", f"{number(counts['other'])}: embeddings, unembeddings, biases, gains"),
            ("precision", settings["precision"]),
            ("sharding", _sharding(settings)),
            ("resblocks", "recomputed in the backward pass" if settings["checkpoint_resblocks"] else "kept"),
            ("PowerSGD", f"rank {settings['powersgd_rank']}" if settings["powersgd_rank"] else "none"),
            (
                "batch",
                f"{batch['samples']:,} samples of {batch['tokens_a_sample']:,} tokens, {batch['a_process']:,} a "
                f"{device} in micro-batches of {batch['micro_batch']:,}",
            ),
        ],
    )


def _sharding(settings: dict[str, Any]) -> str:
    if not settings["zero"]:
        return "none"
    node = f", among {settings['node_size']}" if settings["node_size"] else ""
    return f"ZeRO {settings['zero']}{node}, offload {settings['offload']}"


def _parts(found: dict[str, Any]) -> Table:
    rows = [
        (
            name,
            *(size(part[kind]) if part[kind] else "" for kind in ("in_16", "in_32")),
            size(part["whole"]),
            part["shards"],
            size(part["each"]),
            "" if part["place"] == "device" else part["place"],
        )
        for name, part in found["memory"]["parts"].items()
    ]
    columns = ["Memory", "in 16 bit", "in 32 bit", "whole", "shared by", "of each", "kept on"]
    return grid_table("What stays from update to update", columns, rows, right=range(1, 6))


def _phases(found: dict[str, Any]) -> Table:
    memory, change = found["memory"], found["change"]
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    lines: list[tuple[str, Any]] = [
        ("activations", f"{size(memory['activations_kept'])} from forward to backward pass"),
        *((name, size(most)) for name, most in memory["phases"].items()),
        ("peak", f"{size(memory['peak'])} in {memory['peak_phase']}, of {size(memory['usable'])} usable: {verdict}"),
        ("on the host", f"{size(memory['host_a_machine'])} a machine" if memory["host_a_machine"] else None),
        ("on NVMe", f"{size(memory['nvme_a_machine'])} a machine" if memory["nvme_a_machine"] else None),
    ]
    if change is not None:
        other = change["gpus_per_node"] != found["machines"]["gpus"]
        options = [f"--gpus-per-node {change['gpus_per_node']}"] if other else []
        lines.append(("would fit with" if change["fits"] else "nearest to it", "\n".join([*options, *change["set"]])))
        lines.append(("  then", f"{size(change['peak'])} in {change['peak_phase']}"))
        if change["host_a_machine"]:
            lines.append(("  on the host", f"{size(change['host_a_machine'])} a machine"))
    return pairs_table("At most, of each", lines)


def _between(found: dict[str, Any]) -> list[Table]:
    traffic = found["between_machines"]
    if traffic is None:
        return []
    rows = [
        (
            name,
            size(traffic["a_process"][key]),
            size(traffic["a_machine_on_the_link"][key]),
            "" if traffic["seconds"][key] is None else f"{traffic['seconds'][key]:.2f} s",
        )
        for name, key in (("gradients whole", "whole"), ("as the recipe says", "sent"))
    ]
    columns = ["Between machines, an update", "handed over by each", "on a machine's link", "time"]
    return [
        grid_table(f"Saved by PowerSGD: {traffic['compression']:.1%} of the bytes", columns, rows, right=range(1, 4))
    ]


def _time(found: dict[str, Any]) -> Table:
    time, saved = found["time"], found["checkpoint"]
    days = time["hours"] / 24
    own = f", and {size(saved['each_process'])} of each process" if saved["each_process"] else ""
    return pairs_table(
        "Time",
        [
            ("model FLOPs", f"{time['model_flops']:.4g} an update, and {time['recomputed_flops']:.4g} recomputed"),
            ("an update", f"{time['step_seconds']:.3g} s, {time['compute_seconds']:.3g} s of them at work"),
            ("tokens", f"{time['tokens_per_second']:,.0f} a second"),
            ("MFU", f"{time['mfu']:.1%}"),
            ("training", f"{time['updates']:,} updates: {days:,.1f} days, {time['gpu_hours']:,.0f} GPU hours"),
            ("cost", f"{time['cost']:,.0f}" if time["cost"] is not None else None),
            ("checkpoint", f"{size(saved['bytes'])}: {size(saved['model'])}{own}"),
            (
                "  saving it",
                f"{saved['seconds']:,.3g} s every {saved['every_updates']:,} updates: {saved['share']:.2%} of the time",
            ),
        ],
    )


def _start(start: dict[str, Any]) -> Table:
    rows = start["rows"]
    return pairs_table(
        "A start here",
        [
            ("process", f"{start['process']} of {start['processes']:,}"),
            ("token store", start["store"]),
            (
                "  rows",
                "not there yet" if rows is None else f"{rows['training']:,} to train, {rows['held_out']:,} held out",
            ),
            ("run", start["out"]),
            ("  goes on from", start["goes_on_from"]),
        ],
    )


def _assumed(found: dict[str, Any]) -> Table:
    return pairs_table("Assumed", [("-", text) for text in found["assumptions"]])
