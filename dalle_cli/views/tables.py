"""Tables that ``dalle show`` and ``dalle scan`` print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dalle_cli.progress import printable
from dalle_cli.views.describe import (
    ArrayDescription,
    CheckpointDescription,
    Description,
    SampleStoreDescription,
    TokenizerDescription,
    TokenStoreDescription,
)
from dalle_cli.views.describe_recipe import ClipSizes, Compression, Optimization, RecipeDescription
from dalle_cli.views.describe_run import RunDescription

if TYPE_CHECKING:
    from dalle_cli.data.scan import ScanResult

LONGEST_LIST = 12
SHOWN_QUANTILES = ("0%", "5%", "50%", "95%", "100%")


def render(found: Description, console: Console) -> None:
    """Print the result of ``describe``."""
    match found:
        case TokenStoreDescription():
            tables = _token_store(found)
        case SampleStoreDescription():
            tables = _sample_store(found)
        case CheckpointDescription():
            tables = _checkpoint(found)
        case TokenizerDescription():
            tables = _tokenizer(found)
        case RecipeDescription():
            tables = _recipe(found)
        case RunDescription():
            tables = _run(found)
    print_tables(console, tables)


def _run(found: RunDescription) -> list[Table]:
    rows = [(stage.command, stage.state, stage.detail) for stage in found.stages]
    command = found.line or f"dalle {found.next}"
    next_lines = [("next", "nothing: all stages are done" if found.next is None else command)]
    return [grid_table(f"Run {found.path}", ["stage", "state", ""], rows), pairs_table("", next_lines)]


def render_scan(found: ScanResult, console: Console) -> None:
    """Print the result of ``scan``."""
    formats = ", ".join(f"{name} {count:,}" for name, count in found.picture_formats.items())
    tables = [
        pairs_table(
            f"Source {found.source}",
            [
                ("format", found.format),
                ("samples", f"{found.samples:,}"),
                ("usable", f"{found.usable:,} with a caption and a whole picture"),
                ("kept", f"{found.kept:,} of them by the filters that are on"),
                ("captions", f"{found.captions:,}, {found.captions / max(found.samples, 1):.2f} a sample"),
                ("pictures", formats),
            ],
        ),
        grid_table(
            "Shares of samples at or below",
            ["", *SHOWN_QUANTILES],
            [
                [name, *(f"{values[share]:,.6g}" for share in SHOWN_QUANTILES)]
                for name, values in found.measures.items()
            ],
            right=range(1, len(SHOWN_QUANTILES) + 1),
        ),
    ]
    if found.languages is not None:
        languages = list(found.languages.items())[:LONGEST_LIST]
        rows = [(name, f"{count:,}", f"{count / found.captions:.1%}") for name, count in languages]
        tables.append(grid_table("Languages, guessed", ["", "captions", "share"], rows, right=[1, 2]))
    broken = found.broken
    reasons = [*broken.by_reason.items(), *broken.left_out_by_the_index.items()]
    if reasons:
        first = [*broken.first, *broken.first_left_out_by_the_index][:LONGEST_LIST]
        tables.append(grid_table("Broken", ["reason", "count"], reasons[:LONGEST_LIST], right=[1]))
        tables.append(grid_table("The first of them", ["key", "reason"], [(line.key, line.reason) for line in first]))
    shown = [
        [name, f"{filter_.value}" if isinstance(filter_.value, str) else f"{filter_.value:g}",
         "on" if filter_.on else "", f"{filter_.drops:,}",
         f"{filter_.drops / max(found.samples, 1):.1%}",
         " | ".join(f"{example.key}: {example.shown}" for example in filter_.examples)]
        for name, filter_ in found.filters.items()
    ]  # fmt: skip
    columns = ["data.filters", "value", "", "drops", "share", "examples"]
    tables.append(grid_table("What each filter would drop by itself", columns, shown, right=[1, 3, 4]))
    print_tables(console, tables)


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Print each table under its title in bold."""
    for table in tables:
        # Rich would wrap a table's own title to the width of the table.
        title, table.title = table.title, None
        console.print(Text(printable(str(title)), style="bold"), soft_wrap=True)
        console.print(table)
        console.print()


def number(value: float) -> str:
    """Format a count: ``"2,359"``, and from a million on with a short form, ``"12,094,799,872 (12.09e9)"``."""
    if value < 1_000_000:
        return f"{value:,}"
    return f"{value:,} ({value / 1e9:.2f}e9)" if value >= 1e8 else f"{value:,} ({value / 1e6:.1f}e6)"


def size(value: float) -> str:
    """Format a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def pairs_table(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
    """Return a table of names and values; a row without a value is left out."""
    table = Table(title=title, show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None and value != "":
            table.add_row(name, Text(printable(str(value))))
    return table


def grid_table(title: str, columns: list[str], rows: Iterable[Iterable[Any]], right: Iterable[int] = ()) -> Table:
    """Return a table with a header row; columns whose index is in ``right`` are right-aligned."""
    table = Table(title=title, header_style="dim", box=None, padding=(0, 2), collapse_padding=True)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place in set(right) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    return table


def _recipe(found: RecipeDescription) -> list[Table]:
    tokens, dvae, prior = found.tokens, found.dvae, found.prior
    clip, sampling, weights = found.clip, found.sampling, prior.weight_bytes
    counts, side = prior.parameters, found.image_size
    sharding = prior.sharding
    return [
        pairs_table(
            f"Recipe {found.name}",
            [
                ("description", found.description),
                ("pictures", f"{side} x {side}, from {found.data['train'] or '--data'}"),
                ("grid", f"{found.grid} x {found.grid} image tokens"),
                ("tokens a sample", f"{tokens.text} text + {tokens.image} image = {tokens.total}"),
                ("vocabularies", f"{found.tokenizer['vocab_size']} text, {dvae.codebook_size} image"),
                ("run", found.run),
                *(("warning", line) for line in found.warnings),
            ],
        ),
        pairs_table(
            "dVAE",
            [
                ("parameters", number(dvae.parameters.total)),
                ("  encoder", number(dvae.parameters.encoder)),
                ("  decoder", number(dvae.parameters.decoder)),
                ("estimator", dvae.estimator),
                ("perceptual term", _perceptual(dvae.perceptual)),
                ("precision", dvae.precision),
                *_learning(dvae),
            ],
        ),
        pairs_table(
            "Prior",
            [
                ("parameters", number(counts.total)),
                ("  effective", f"{number(counts.effective)}: matrices of the resblocks, 12 d^2 a layer"),
                ("  other", f"{number(counts.other)}: embeddings, unembeddings, biases, gains"),
                ("layers", prior.layers),
                ("d_model", f"{prior.heads} heads x {prior.d_head} = {prior.d_model}"),
                *(
                    (f"  {kind} attention", f"layers {layers}: {prior.attention_as[kind]}")
                    for kind, layers in prior.attention.items()
                ),
                ("matmul on this CPU", f"{prior.cpu_matmul}, in 32 bit"),
                (
                    "weights",
                    f"{size(weights.total)}: {size(weights.resblock_matrices_16_bit)} of matrices in 16 bit, "
                    f"{size(weights.others_32_bit)} of others in 32",
                ),
                ("precision", prior.precision),
                ("sharding", sharding_text(sharding["engine"], sharding["zero"], sharding["offload"])),
                ("PowerSGD", _compression(prior.powersgd)),
                *_learning(prior),
            ],
        ),
        pairs_table(
            "CLIP and sampling",
            [
                ("CLIP", f"{_picture_tower(clip)}, {clip.embed_dim}-d, {clip.text_layers} text layers; "
                         f"{clip.updates:,} updates of {clip.batch_size:,}"),
                ("samples", f"{sampling['n']} a caption at temperature {sampling['temperature']:g}"),
            ],
        ),
    ]  # fmt: skip


def _perceptual(settings: Mapping[str, Any]) -> str | None:
    if not settings["weight"]:
        return None
    since = settings["enlarged_from"]
    enlarged = "" if since is None else f", at twice the size too from update {since:,} on"
    return f"{settings['network']}, weight {settings['weight']:g}{enlarged}"


def _picture_tower(clip: ClipSizes) -> str:
    if clip.vision is not None:
        return f"{clip.vision} at {clip.vision_size} px"
    return f"patches of {clip.patch_size}, {clip.vision_layers} vision layers"


def sharding_text(engine: str, zero: int, offload: str, node_size: int | None = None) -> str:
    """Return how a prior is sharded, and among how many processes if the recipe says so."""
    if not zero:
        return "none"
    library = "DeepSpeed's " if engine == "deepspeed" else ""
    node = f" among {node_size} processes" if node_size else ""
    return f"{library}ZeRO {zero}{node}, offload {offload}"


def _compression(powersgd: Compression) -> str:
    return f"rank {powersgd.rank}, compression {powersgd.compression:.1%}" if powersgd.rank else "none"


def _learning(stage: Optimization) -> list[tuple[str, str]]:
    return [
        ("optimizer", stage.optimizer),
        ("learning rate", stage.schedule),
        ("training", f"{stage.updates:,} updates of {stage.batch_size:,} samples"),
    ]


def _token_store(found: TokenStoreDescription) -> list[Table]:
    usable = found.usable_rows
    parts = found.parts.items()
    skipped = [(part, reason, count) for part, counts in found.skipped.items() for reason, count in counts.items()]
    absent = [part for part in ("text", "image") if part not in found.parts]
    source = found.source
    counted_when = "training starts" if found.complete else "the store is complete"
    unknown = f"unknown until there is a part {absent[0]}" if absent else f"not counted until {counted_when}"
    return [
        pairs_table(
            f"Token store {found.path}",
            [
                ("rows", f"{found.rows:,}"),
                ("usable rows", f"{usable:,}" if usable is not None else unknown),
                ("complete", "yes" if found.complete else "no"),
                *((f"  {part}", f"{s.rows:,} rows{'' if s.complete else ', unfinished'}") for part, s in parts),
                *((f"  {part}", "not begun") for part in absent),
                ("source", ", ".join(source) if isinstance(source, list) else source),
                ("tokenizer", found.tokenizer),
                ("dVAE", found.dvae),
                ("on disk", size(found.bytes) if found.bytes is not None else "not counted"),
            ],
        ),
        _array_table(found.arrays),
        *([grid_table("Skipped", ["part", "reason", "rows"], skipped, right=[2])] if skipped else []),
        *(
            [
                grid_table(
                    "First captions",
                    ["row", "tokens", "caption"],
                    [(c.row, c.tokens, c.caption) for c in found.captions],
                    right=[0, 1],
                )
            ]
            if found.captions
            else []
        ),
    ]


def _sample_store(found: SampleStoreDescription) -> list[Table]:
    prompts = found.prompts
    settings = found.settings
    shown = [(row, prompt) for row, prompt in enumerate(prompts[:LONGEST_LIST])]
    more = [("...", f"and {len(prompts) - LONGEST_LIST} more")] if len(prompts) > LONGEST_LIST else []
    return [
        pairs_table(
            f"Sample store {found.path}",
            [
                ("samples", f"{len(prompts):,} prompts x {found.samples_a_prompt:,} = {found.rows:,}"),
                ("committed", f"{found.committed:,}{'' if found.complete else ', unfinished'}"),
                ("seed", found.seed),
                ("settings", ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)),
                ("prior", found.prior),
            ],
        ),
        _array_table(found.arrays),
        grid_table("Prompts", ["", "caption"], [*shown, *more], right=[0]),
    ]


def _array_table(arrays: dict[str, ArrayDescription]) -> Table:
    rows = [
        (
            name,
            " x ".join(str(side) for side in array.shape),
            array.dtype,
            size(array.bytes) if array.bytes is not None else "",
        )
        for name, array in arrays.items()
    ]
    return grid_table("Arrays", ["name", "shape", "type", "on disk"], rows, right=[3])


def _checkpoint(found: CheckpointDescription) -> list[Table]:
    parameters = found.parameters
    files = [
        (name, size(file.bytes) if file.bytes is not None else "missing", file.sha256 or "")
        for name, file in found.files.items()
    ]
    metrics = [(name, f"{value:.6g}") for name, value in found.metrics.items()]
    return [
        pairs_table(
            f"Checkpoint {found.path}",
            [
                ("kind", found.kind),
                ("step", f"{found.step:,} of {found.updates:,} updates"),
                ("parameters", number(parameters) if parameters is not None else None),
                ("recipe", found.recipe),
                *((f"belongs to {role}", digest) for role, digest in found.belongs.items()),
                ("kept in its run", ", ".join(found.checkpoints_in_run)),
                *(("warning", warning) for warning in found.warnings),
            ],
        ),
        grid_table("Files", ["name", "size", "sha256"], files, right=[1]),
        *([grid_table("Validation", ["metric", "value"], metrics, right=[1])] if metrics else []),
    ]


def _tokenizer(found: TokenizerDescription) -> list[Table]:
    return [
        pairs_table(
            f"Tokenizer {found.path}",
            [
                ("vocabulary", f"{found.vocab_size:,} byte-level BPE tokens"),
                ("sha256", found.sha256),
                (
                    "some of its tokens",
                    "  ".join(json.dumps(t, ensure_ascii=False) for t in found.examples.values()),
                ),
            ],
        )
    ]
