"""``dalle sample``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dalle_cli.commands.options import CheckpointOption


def command(
    prior: Annotated[Path, typer.Argument(metavar="PRIOR", help="Prior checkpoint, or its run.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Captions to draw.")] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Captions: text, one a line; .jsonl; COCO's .json; a folder, as by --data; - is stdin."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Draw the first captions of these captioned pictures; repeatable."),
    ] = None,
    held_out: Annotated[bool, typer.Option(help="Draw the first held-out captions of the run's token store.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Number of captions per source, and of held-out captions.")] = 50,
    n: Annotated[
        int | None, typer.Option("--n", min=1, max=10**6, help="Samples of each caption. \\[sampling.n]")
    ] = None,
    index: Annotated[
        int | None, typer.Option(min=0, help="Draw only this sample of each caption, or N samples from it on.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all samples.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Temperature; 0 takes the likeliest token. \\[sampling]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest tokens. \\[sampling]")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens of this total probability. \\[sampling]"),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Classifier-free guidance, such as 3; 1 for none. \\[sampling]")
    ] = None,
    prime: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="Picture whose first rows of tokens are given.")
    ] = None,
    prime_rows: Annotated[
        str | None, typer.Option(metavar="K", help="Number of given rows, or their share of the picture, such as 0.5.")
    ] = None,
    which: CheckpointOption = "best",
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Draw the I-th of N shares, in OUT.parts, for a job array.")
    ] = "1/1",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most samples to draw at once. \\[as memory allows]", show_default=False)
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "int8"] | None,
        typer.Option(help="int8 is fastest for one picture on a CPU, auto measures fp32 and bf16. \\[sampling]"),
    ] = None,
    dvae: Annotated[Path | None, typer.Option(help="dVAE checkpoint. \\[beside the prior's run]")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json. \\[beside the prior's run]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the samples. [RUN/samples/...]")] = None,
) -> None:
    """Draw pictures for captions: PNG files and a Zarr store of their tokens.

    Into a pipe or file, it prints a JSON object for each sample once it is drawn. If it is killed, run it again to
    resume. A sample depends on models, settings, seed, caption and index alone, so any can be drawn again by itself.

    JSON lines have the caption under "prompt" or "caption". Their id, key, image_id and caption_id are copied to the
    samples; "prime" is a picture whose first rows are given, as with --prime for all captions. To join the shares of
    --shard, concatenate their output.

    Example: [bold]dalle sample runs/quickstart/prior "a small red star above a large blue square" --n 32 |
    dalle rerank --top 1[/bold]
    """
    from dalle_cli.config.run_folders import run_of
    from dalle_cli.data.captions import Caption, first_captions, read_captions
    from dalle_cli.errors import UserError
    from dalle_cli.progress import printable_json
    from dalle_cli.stores.checkpoint import open_stage
    from dalle_cli.stores.shards import parse_shard

    checkpoint = open_stage(prior, "prior", which)
    recipe, places = checkpoint.recipe(), run_of(checkpoint.path)
    share = parse_shard(shard)
    wanted = [Caption(text) for text in prompts or []]
    sources = data or []
    if captions is not None and captions.is_dir():
        sources = [*sources, str(captions)]
    elif captions is not None:
        wanted += read_captions(captions)
    for source in sources:
        wanted += map(Caption, first_captions(source, recipe.data.filters, limit))
    if held_out:
        from dalle_cli.stores.held_out import held_out_captions

        if not recipe.data.holds_out:
            raise UserError("--held-out: data.holdout was 0, so no caption was held out; give captions, or --captions")
        wanted += map(Caption, held_out_captions(places.tokens, recipe, limit))
    if not wanted:
        raise UserError("no captions to draw; give them as arguments, or --captions FILE with one a line")
    if top_p == 0:
        raise UserError("--top-p 0 leaves no token to draw; give a share above 0, or --temperature 0 for the likeliest")
    given = {
        "n": 1 if n is None and index is not None else n, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "guidance": guidance, "batch_size": batch_size, "precision": precision,
    }  # fmt: skip
    settings = recipe.sampling.model_copy(update={key: value for key, value in given.items() if value is not None})
    dvae_checkpoint = open_stage(dvae or places.dvae, "dvae")

    from dalle_cli.sampling.request import SampleRequest, choose_prime, default_folder, shard_folder
    from dalle_cli.sampling.sampler import Sampler
    from dalle_cli.stores.provenance import record_command
    from dalle_cli.text.bpe import Tokenizer

    sampler = Sampler(checkpoint, dvae_checkpoint, Tokenizer.load(tokenizer or places.tokenizer))
    pictures, max_pixels = [caption.prime or prime for caption in wanted], dvae_checkpoint.recipe().data.max_pixels
    request = SampleRequest(
        [caption.text for caption in wanted],
        settings,
        seed,
        first=index or 0,
        prime=choose_prime(pictures, prime_rows, recipe.grid, max_pixels),
        ids=[caption.ids for caption in wanted],
        shard=share,
    )
    folder = out or default_folder(places.samples, request.identity(checkpoint))
    terminal = sys.stdout.isatty()
    count = 0
    for line in sampler.run(request, folder):
        count += 1
        if not terminal:
            print(printable_json(line), flush=True)
    if request.rows:
        record_command(shard_folder(folder, share))
    if terminal:
        print(f"{count} samples of {len(wanted)} captions in {shard_folder(folder, share)}")
