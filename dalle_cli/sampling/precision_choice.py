"""``sampling.precision: auto``: on a CPU the faster of fp32 and bf16, measured on decoding steps of the recipe's sizes.

The precision is among the things that decide a sample. So it is settled once for a folder of samples, whose store
records it, and from the recipe's settings rather than a request's: a sample is the same alone as among 512 others.
Shares may be drawn on unlike machines, which would choose differently, so they are drawn in fp32 unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.distributed.device import choose_device, gpu_precision, lacks_bf16, prepare_process, use_settings
from dalle_cli.precision.choice import Choosable, faster_precision
from dalle_cli.prior.cpu_kernels import Precision
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import Prior, load_prior
from dalle_cli.progress import log
from dalle_cli.sampling.request import SampleRequest
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.samples import settings_in
from dalle_cli.stores.shards import WHOLE

KEY = "sampling.precision"
TRIAL_SAMPLES = 16
"""Most samples of a trial: few enough for any memory, and with more the ratio of the precisions hardly changes."""


def settle_precision(request: SampleRequest, prior: Checkpoint, folder: Path) -> SampleRequest:
    """Return the request with a precision in place of ``sampling.precision: auto``; log it.

    Samples of the request that ``folder`` already holds, if any, keep their precision.
    """
    if request.settings.precision != "auto":
        return request
    device = choose_device()
    chosen: Precision
    if begun := _begun_in(folder):
        chosen, reason = begun, "as the samples have begun"
    elif request.shard != WHOLE:
        chosen, reason = "fp32", f"shares may be drawn on unlike machines; where all have it, set {KEY}: bf16"
    elif device.type == "cpu":
        chosen, reason = _measured(prior, device)
    else:
        chosen, reason = gpu_precision(device, lacks_bf16(device))
    log(f"{KEY}: auto is {chosen}: {reason}")
    return replace(request, settings=request.settings.model_copy(update={"precision": chosen}))


def _begun_in(folder: Path) -> Precision | None:
    """Return the precision of the samples in ``folder``, or None if it has none."""
    found = settings_in(folder).get("precision")
    return next((precision for precision in get_args(Precision) if precision == found), None)


def _measured(prior: Checkpoint, device: torch.device) -> tuple[Choosable, str]:
    """Return the precision in which the prior's decoding steps are faster, and the reason."""
    recipe = prior.recipe()
    use_settings(recipe)
    prepare_process(device)
    sizes = {
        "model": recipe.prior.model.model_dump(),
        "sampled": _trial_shape(recipe.sampling),
        "data": [recipe.dvae.model.codebook_size, recipe.tokenizer.text_length],
    }
    return faster_precision(
        KEY, "a row of tokens", sizes, lambda tried: trial_row(load_prior(prior), recipe.sampling, tried)
    )


def trial_row(prior: Prior, settings: SamplingSettings, precision: Choosable) -> Callable[[], None]:
    """Return a function that makes the decoding steps of a row of tokens in the middle of a picture."""
    decoder = Decoder(prior, precision)
    sequences, samples = _trial_shape(settings)
    cache = decoder.prefill(torch.zeros(sequences, decoder.text_length, dtype=torch.long)).fork(samples)
    for layer in cache.image:
        layer.zero_()  # the rows above are not drawn, and memory may hold numbers that compute slowly
    token = torch.zeros(sequences, samples, dtype=torch.long)
    middle = decoder.image_length // 2
    row = range(middle, min(middle + decoder.grid, decoder.image_length - 1))

    def steps() -> None:
        for position in row:
            decoder.step(cache, position, token)

    return steps


def _trial_shape(settings: SamplingSettings) -> tuple[int, int]:
    """Return the numbers of texts, 2 with guidance, and of samples of each in a trial."""
    return 1 if settings.guidance == 1 else 2, min(settings.n, settings.batch_size or TRIAL_SAMPLES, TRIAL_SAMPLES)
