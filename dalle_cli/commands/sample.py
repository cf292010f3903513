"""``dalle sample``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    prior: Annotated[Path, typer.Argument(metavar="PRIOR", help="Prior checkpoint, or its run.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Captions to draw.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="File of captions, one a line; - is stdin.")
    ] = None,
    captions: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Draw the first captions of these sources; repeatable.")
    ] = None,
    held_out: Annotated[bool, typer.Option(help="Draw captions of the run's store that training left out.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Captions of each source, or left out.")] = 50,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Samples of each caption. [sampling.n]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides every sample.")] = 0,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 takes the likeliest token. [sampling]")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest tokens. [sampling]")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw among this mass. [sampling]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples drawn at once. [sampling]")] = None,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="bf16 is faster. [sampling]")] = None,
    dvae: Annotated[Path | None, typer.Option(help="dVAE checkpoint. [beside the prior's run]")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json. [beside the prior's run]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the samples. [RUN/samples/...]")] = None,
) -> None:
    """Draw pictures for captions: PNG files and a Zarr store of their tokens.

    Into a pipe or file it prints one JSON object a sample as it is drawn. Killed, it goes on where it stopped.

    Example: [bold]dalle sample runs/quickstart/prior "a small red star above a large blue square" --n 32 |
    dalle rerank --top 1[/bold]
    """
    import json

    from dalle_cli.errors import UserError
    from dalle_cli.recipes.folders import run_of
    from dalle_cli.stores.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(prior, "prior")
    places = run_of(checkpoint.path)
    wanted = [*(prompts or []), *_read_prompts(prompts_file)]
    for source in captions or []:
        wanted += _captions_of(source, limit)
    if held_out:
        from dalle_cli.training.held_out import held_out_captions

        wanted += held_out_captions(places.tokens, checkpoint.recipe(), limit)
    if not wanted:
        raise UserError("no captions to draw; give them as arguments, or --prompts FILE with one a line")
    if top_p == 0:
        raise UserError("--top-p 0 leaves no token to draw; give a share above 0, or --temperature 0 for the likeliest")
    given = {
        "n": n, "temperature": temperature, "top_k": top_k, "top_p": top_p, "batch_size": batch_size,
        "precision": precision,
    }  # fmt: skip
    recipe = checkpoint.recipe()
    settings = recipe.sampling.model_copy(update={key: value for key, value in given.items() if value is not None})
    dvae_checkpoint = open_checkpoint(dvae or places.dvae, "dvae")

    from dalle_cli.sampling.pipeline import Sampler, SampleRequest, default_folder
    from dalle_cli.text.bpe import Tokenizer

    sampler = Sampler(checkpoint, dvae_checkpoint, Tokenizer.load(tokenizer or places.tokenizer))
    request = SampleRequest(wanted, settings, seed)
    folder = out or default_folder(places.samples, request, checkpoint)
    terminal = sys.stdout.isatty()
    count = 0
    for line in sampler.run(request, folder):
        count += 1
        if not terminal:
            print(json.dumps(line, ensure_ascii=False), flush=True)
    if terminal:
        print(f"{count} samples of {len(wanted)} captions in {folder}")


def _captions_of(spec: str, limit: int) -> list[str]:
    from itertools import islice

    from dalle_cli.data.sources import open_source
    from dalle_cli.text.tokenize import source_captions

    distinct = dict.fromkeys(source_captions(open_source(spec)))
    return list(islice(distinct, limit))


def _read_prompts(file: Path | None) -> list[str]:
    from dalle_cli.errors import UserError

    if file is None:
        return []
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a file of captions ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
