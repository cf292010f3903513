"""``dalle sample``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from dalle_cli.sampling.request import Prime


def command(
    prior: Annotated[Path, typer.Argument(metavar="PRIOR", help="Prior checkpoint, or its run.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Captions to draw.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="Captions one a line, JSON lines (.jsonl) or COCO's captions_*.json; - is stdin."
        ),
    ] = None,
    captions: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Draw the first captions of these sources; repeatable.")
    ] = None,
    held_out: Annotated[bool, typer.Option(help="Draw captions of the run's store that training left out.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Captions of each source, or left out.")] = 50,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Samples of each caption. \\[sampling.n]")] = None,
    index: Annotated[
        int | None, typer.Option(min=0, help="Draw this sample of each caption alone (or N from it on).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides every sample.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the likeliest token. \\[sampling]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest tokens. \\[sampling]")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw among this mass. \\[sampling]")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Classifier-free guidance, such as 3; 1 is none. \\[sampling]")
    ] = None,
    prime: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="Give the first rows of tokens of this picture.")
    ] = None,
    prime_rows: Annotated[
        str | None, typer.Option(metavar="K", help="How many rows are given, or a share below 1 such as 0.5.")
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Draw the I-th of N shares, in OUT.parts, for a job array.")
    ] = "1/1",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most samples drawn at once. \\[as memory allows]", show_default=False)
    ] = None,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="bf16 is faster. \\[sampling]")] = None,
    dvae: Annotated[Path | None, typer.Option(help="dVAE checkpoint. \\[beside the prior's run]")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json. \\[beside the prior's run]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the samples. [RUN/samples/...]")] = None,
) -> None:
    """Draw pictures for captions: PNG files and a Zarr store of their tokens.

    Into a pipe or file it prints one JSON object a sample as it is drawn. Killed, it goes on where it stopped. A
    sample follows from models, settings, seed, caption and index alone, so that any can be drawn again by itself.

    A caption of JSON lines stands under prompt or caption; id, key, image_id and caption_id are kept in what is
    printed, and prime names a picture whose first rows are given for this caption, as --prime does for all. The
    shares of --shard are joined by concatenating what they print.

    Example: [bold]dalle sample runs/quickstart/prior "a small red star above a large blue square" --n 32 |
    dalle rerank --top 1[/bold]
    """
    import json

    from dalle_cli.config.run_folders import run_of
    from dalle_cli.errors import UserError
    from dalle_cli.sampling.prompts import Prompt, read_prompts
    from dalle_cli.stores.checkpoint import open_checkpoint
    from dalle_cli.stores.shards import parse_shard

    checkpoint = open_checkpoint(prior, "prior")
    places = run_of(checkpoint.path)
    share = parse_shard(shard)
    wanted = [Prompt(text) for text in prompts or []]
    if prompts_file is not None:
        wanted += read_prompts(prompts_file)
    for source in captions or []:
        wanted += [Prompt(text) for text in _captions_of(source, limit)]
    if held_out:
        from dalle_cli.stores.held_out import held_out_captions

        wanted += [Prompt(text) for text in held_out_captions(places.tokens, checkpoint.recipe(), limit)]
    if not wanted:
        raise UserError("no captions to draw; give them as arguments, or --prompts FILE with one a line")
    if top_p == 0:
        raise UserError("--top-p 0 leaves no token to draw; give a share above 0, or --temperature 0 for the likeliest")
    given = {
        "n": 1 if n is None and index is not None else n, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "guidance": guidance, "batch_size": batch_size, "precision": precision,
    }  # fmt: skip
    recipe = checkpoint.recipe()
    settings = recipe.sampling.model_copy(update={key: value for key, value in given.items() if value is not None})
    dvae_checkpoint = open_checkpoint(dvae or places.dvae, "dvae")

    from dalle_cli.sampling.request import SampleRequest, default_folder, shard_folder
    from dalle_cli.sampling.sampler import Sampler
    from dalle_cli.stores.provenance import record_command
    from dalle_cli.text.bpe import Tokenizer

    sampler = Sampler(checkpoint, dvae_checkpoint, Tokenizer.load(tokenizer or places.tokenizer))
    request = SampleRequest(
        [prompt.text for prompt in wanted],
        settings,
        seed,
        index or 0,
        _prime([prompt.prime or prime for prompt in wanted], prime_rows, recipe.grid),
        [prompt.ids for prompt in wanted],
        share,
    )
    folder = out or default_folder(places.samples, sampler.identity(request))
    terminal = sys.stdout.isatty()
    count = 0
    for line in sampler.run(request, folder):
        count += 1
        if not terminal:
            print(json.dumps(line, ensure_ascii=False), flush=True)
    if request.rows:
        record_command(shard_folder(folder, share))
    if terminal:
        print(f"{count} samples of {len(wanted)} captions in {shard_folder(folder, share)}")


def _prime(pictures: list[Path | None], rows: str | None, grid: int) -> Prime | None:
    """What is given of each prompt's picture, if anything."""
    from dalle_cli.errors import UserError
    from dalle_cli.sampling.request import Prime, parse_rows

    named = [picture for picture in pictures if picture is not None]
    if not named and rows is None:
        return None
    if not named:
        raise UserError(
            "--prime-rows: of which picture? name it with --prime, or as prime in the JSON lines of --prompts"
        )
    if rows is None:
        raise UserError("--prime: how many of the picture's rows are given? say it with --prime-rows, such as 0.5")
    if len(named) < len(pictures):
        raise UserError(f"prompt {pictures.index(None) + 1}: has no prime, others have; give one for all with --prime")
    return Prime(named, parse_rows(rows, grid))


def _captions_of(spec: str, limit: int) -> list[str]:
    from itertools import islice

    from dalle_cli.data.open_source import open_source
    from dalle_cli.text.tokenize import source_captions

    distinct = dict.fromkeys(source_captions(open_source(spec)))
    return list(islice(distinct, limit))
