"""Sampling: draw tokens from the prior and decode them with the dVAE, into a PNG file and a JSON line per sample.

A sample is a function of (models, settings, seed, prompt, index). So any sample can be drawn again by itself, and a
killed job resumes with the same pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dalle_cli.config.run_folders import run_of
from dalle_cli.config.schema import SamplingSettings
from dalle_cli.data.source import BadSample, clean_caption
from dalle_cli.data.workers import map_blocks
from dalle_cli.distributed.device import (
    choose_device,
    device_for_doubles,
    explain_out_of_memory,
    prepare_process,
    require_precision,
    use_settings,
)
from dalle_cli.dvae.encode import decode_tokens
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.cpu_kernels import Precision
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import load_prior
from dalle_cli.progress import Progress, log, progress
from dalle_cli.sampling.batch_size import DECODED_AT_ONCE, MAX_SAMPLES, free_memory, sampling_need
from dalle_cli.sampling.draw import sample_images
from dalle_cli.sampling.precision_choice import settle_precision
from dalle_cli.sampling.request import SampleRequest, shard_folder
from dalle_cli.stores.checkpoint import Checkpoint, check_belongs
from dalle_cli.stores.files import explain_os_errors, owned
from dalle_cli.stores.png import has_end
from dalle_cli.stores.samples import STORE, ManifestLines, SampleStore, png_name
from dalle_cli.stores.shards import WHOLE
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.encode import CaptionEncoder

LOWEST_TEMPERATURE = 1e-3
"""Lowest temperature above 0."""
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens (B, grid, grid) uint16, log-likelihoods (B,) in nats, and pictures (B, S, S, 3) uint8 of a batch."""


@dataclass
class _LoadedModels:
    """Models on the device, with text ids (C, T), the empty caption's ids (T,) and given image tokens (C, P)."""

    decoder: Decoder
    dvae: DVAE
    eps: float
    text_ids: Tensor
    empty: Tensor
    given: Tensor

    def draw(self, request: SampleRequest, prompts: range, indices: range) -> Drawn:
        """Draw a batch of samples."""
        some = slice(prompts.start, prompts.stop)
        uniforms = request.uniforms(prompts, indices, self.decoder.image_length)
        tokens, scores = sample_images(
            self.decoder,
            self.text_ids[some],
            uniforms.to(device_for_doubles(self.decoder.device)),
            request.settings.model_copy(update={"batch_size": None}),
            self.given[some],
            empty=self.empty,
        )
        grids = tokens.flatten(0, 1).unflatten(-1, (self.decoder.grid, self.decoder.grid))
        pictures = [decode_tokens(self.dvae, part, self.eps).cpu().numpy() for part in grids.split(DECODED_AT_ONCE)]
        return grids.cpu().numpy().astype(np.uint16), scores.flatten().cpu().numpy(), np.concatenate(pictures)

    def draw_from(self, request: SampleRequest, row: int, size: int, bar: Progress) -> Iterator[Drawn]:
        """Draw all samples from ``row`` on, ``size`` at once, or fewer if a GPU's memory does not hold them."""
        while row < request.rows.stop:
            try:
                drawn = self.draw(request, *request.batch(row, size))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                bar.say(f"sample: out of memory; continuing with {size} samples at once")
                continue
            row += len(drawn[0])
            yield drawn


@dataclass(frozen=True)
class _DrawAlone:
    """Draws a batch, given by its rows, in a process of one thread."""

    models: _LoadedModels
    request: SampleRequest

    def __call__(self, rows: range) -> Drawn:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.models.draw(self.request, *self.request.batch(rows.start, len(rows)))
        finally:
            torch.set_num_threads(before)


@dataclass
class Sampler:
    """A prior with the dVAE and the tokenizer it was trained with; refuses others."""

    prior_checkpoint: Checkpoint
    dvae_checkpoint: Checkpoint
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        check_belongs(self.prior_checkpoint, "dvae", self.dvae_checkpoint.identity, str(self.dvae_checkpoint.path))
        check_belongs(self.prior_checkpoint, "tokenizer", self.tokenizer.identity, self.tokenizer.name)

    def run(self, request: SampleRequest, out: Path) -> Iterator[dict[str, Any]]:
        """Draw into ``out/samples.zarr`` and PNG files, and yield each sample's line, in order, once committed.

        A shard is drawn into ``shard_folder(out, shard)``. A batch's lines are yielded at the latest after the next
        batch is drawn.

        Raises:
            UserError: a prompt is empty or refused as too long, a given picture cannot be read, the prior was trained
                without the caption dropout that guidance needs, the folder holds samples of another request, or another
                process is drawing into it.
        """
        text = self._encode(request.prompts)
        self._require_dropout(request.settings)
        if 0 < request.settings.temperature < LOWEST_TEMPERATURE:  # logits divided by it might overflow
            raise UserError(
                f"temperature {request.settings.temperature:g}: is above 0 and below {LOWEST_TEMPERATURE:g}; give 0, "
                "which takes the likeliest token"
            )
        folder = shard_folder(out, request.shard)
        request = settle_precision(request, self.prior_checkpoint, folder)
        identity = request.identity(self.prior_checkpoint)
        if request.shard != WHOLE:
            identity["shard"] = str(request.shard)
        if request.rows:
            with owned(folder):
                yield from self._draw(request, text, identity, folder)

    def _draw(
        self, request: SampleRequest, text: tuple[np.ndarray, np.ndarray], identity: dict[str, Any], folder: Path
    ) -> Iterator[dict[str, Any]]:
        """Draw the rows that ``folder`` lacks, and yield the lines of all."""
        recipe = self.prior_checkpoint.recipe()
        run = run_of(self.prior_checkpoint.path).root
        store = SampleStore(folder, identity, len(request.rows), recipe.grid, run)
        self._draw_lost(request, store)
        lines = partial(_lines, request, store)
        row = request.rows.start + store.committed
        yield from lines(request.rows.start, store.log_likelihood())
        if row == request.rows.stop:
            return
        use_settings(recipe)
        mend = "lower sampling.batch_size (--batch-size)"
        with explain_out_of_memory(folder, mend):
            models = self._load(request, text)
        processes, size = processes_and_size(request, models.decoder, models.dvae)
        pending: list[tuple[int, np.ndarray, Future[None]]] = []
        total = len(request.rows)
        with (
            progress("sample", total, "images", store.committed) as bar,
            explain_out_of_memory(folder, mend),
            store,
            ExitStack() as held,
        ):
            batches: Any = (
                models.draw_from(request, row, size, bar)
                if processes == 1
                else map_blocks(_DrawAlone(models, request), list(request.batches_from(row, size)), processes, mend)
            )
            held.callback(batches.close)  # so that no process draws on after a fault
            for tokens, scores, pictures in batches:
                names = [_name(request, store, r) for r in range(row, row + len(pictures))]
                pending.append((row, scores, store.add(row - request.rows.start, tokens, scores, pictures, names)))
                row += len(pictures)
                bar.advance(len(pictures))
                if len(pending) == 2:
                    first_row, scores, written = pending.pop(0)
                    written.result()
                    yield from lines(first_row, scores)
            for first_row, scores, written in pending:
                written.result()
                yield from lines(first_row, scores)

    def _draw_lost(self, request: SampleRequest, store: SampleStore) -> None:
        """Draw the pictures of committed samples anew, from their tokens, where files are missing or were cut short."""
        first = request.rows.start
        names = [_name(request, store, row) for row in range(first, first + store.committed)]
        lost = [row for row, name in enumerate(names) if not has_end(store.out / name)]
        if not lost:
            return
        log(f"{store.out}: {len(lost)} pictures are missing or were cut short; they are drawn again from their tokens")
        recipe, device = self.dvae_checkpoint.recipe(), choose_device()
        use_settings(self.prior_checkpoint.recipe())
        prepare_process(device)
        dvae, eps = load_dvae(self.dvae_checkpoint).to(device), recipe.dvae.objective.logit_laplace_eps
        with explain_os_errors(store.out):
            for begin in range(0, len(lost), DECODED_AT_ONCE):
                rows = lost[begin : begin + DECODED_AT_ONCE]
                tokens = torch.from_numpy(store.tokens(rows).astype(np.int64)).to(device)
                store.save_all(decode_tokens(dvae, tokens, eps).cpu().numpy(), [names[row] for row in rows])

    def _load(self, request: SampleRequest, text: tuple[np.ndarray, np.ndarray]) -> _LoadedModels:
        dvae_recipe, device = self.dvae_checkpoint.recipe(), choose_device()
        prepare_process(device)
        precision = cast(Precision, request.settings.precision)  # auto is settled by now
        require_precision("sampling.precision", precision, device)
        prior, dvae = load_prior(self.prior_checkpoint).to(device), load_dvae(self.dvae_checkpoint).to(device)
        text_ids = prior.with_padding(*(torch.from_numpy(part).to(device) for part in text))
        empty = prior.with_padding(torch.zeros_like(text_ids[:1]), torch.zeros(1, device=device))[0]
        return _LoadedModels(
            Decoder(prior, precision),  # copies the matrices
            dvae,
            dvae_recipe.dvae.objective.logit_laplace_eps,
            text_ids,
            empty,
            request.prime.tokens(dvae, dvae_recipe) if request.prime else text_ids[:, :0],
        )

    def _require_dropout(self, settings: SamplingSettings) -> None:
        if settings.guidance != 1 and not self.prior_checkpoint.recipe().prior.caption_dropout:
            raise UserError(
                f"{self.prior_checkpoint.path}: guidance {settings.guidance:g} needs a prior that has learned images "
                "without captions, and this one was trained with prior.caption_dropout: 0; train one with "
                "prior.caption_dropout: 0.1, or leave --guidance out"
            )

    def _encode(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        for number, prompt in enumerate(prompts, start=1):
            try:
                clean_caption(prompt)
            except BadSample as error:
                raise UserError(f"prompt {number}: {error}; write what the picture shows") from None
        settings = self.prior_checkpoint.recipe().tokenizer
        encoder = CaptionEncoder(self.tokenizer, settings)
        text = encoder.encode(prompts)
        if encoder.cut:
            length = settings.text_length
            log(f"sample: {encoder.cut} of {len(prompts)} captions cut to the {length} tokens that the prior reads")
        return text


def processes_and_size(request: SampleRequest, decoder: Decoder, dvae: DVAE) -> tuple[int, int]:
    """Return the number of processes that draw, and the batch size.

    On a CPU, processes of one thread each draw more in all than one process whose threads wait for one another in every
    small product. So there is one for each thread of torch, if the request is of several batches and memory holds a
    batch of full size in each. What is left of a resumed request does not count: it is drawn as the rest was.
    """
    cores = torch.get_num_threads() if decoder.device.type == "cpu" and hasattr(os, "fork") else 1
    size = samples_at_once(request, decoder, dvae, cores)
    full = min(MAX_SAMPLES["cpu"], request.settings.batch_size or MAX_SAMPLES["cpu"])
    if cores > 1 and size == full and len(request.rows) > size:
        return cores, size
    return 1, samples_at_once(request, decoder, dvae)


def samples_at_once(request: SampleRequest, decoder: Decoder, dvae: DVAE, processes: int = 1) -> int:
    """Return the batch size: as many samples as fit into memory, at most the request's ``batch_size``.

    Memory is shared by ``processes`` that draw a batch each.
    """
    settings, device = request.settings, decoder.device
    given = request.prime.rows * decoder.grid if request.prime else 0
    need = sampling_need(decoder, dvae, settings.guidance != 1, given)
    free = free_memory(device)
    shared = None if free is None else free // processes
    fits = need.fitting_samples(shared, settings.n, MAX_SAMPLES[device.type])
    return min(fits, settings.batch_size or fits)


def _name(request: SampleRequest, store: SampleStore, row: int) -> str:
    """Return the file of the picture of a row of the request."""
    prompt, index = request.place(row)
    return png_name(prompt, index, request.prompts[prompt], store.in_folders)


def _lines(request: SampleRequest, store: SampleStore, first_row: int, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    elsewhere = store.elsewhere
    lines = ManifestLines(store.out / STORE, request.prompts, request.seed, store.in_folders)
    for row, score in enumerate(scores, start=first_row):
        prompt, index = request.place(row)
        line = lines.line(row - request.rows.start, prompt, index, score) | elsewhere
        if request.ids is not None:
            line |= request.ids[prompt]
        if request.prime is not None:
            line |= {"prime": str(request.prime.pictures[prompt]), "prime_rows": request.prime.rows}
        yield line
