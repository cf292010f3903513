"""Captions to pictures on disk: tokens drawn from the prior, decoded by the dVAE, one PNG and one line a sample.

A sample is a function of (models, settings, seed, prompt, index): its random numbers are drawn from those, so any
sample can be drawn again alone, and a killed job goes on where it stopped with the same pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.data.source import BadSample, clean_caption
from dalle_cli.distributed.device import choose_device, explain_out_of_memory, limit_threads
from dalle_cli.dvae.encode import decode_pictures
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import load_prior
from dalle_cli.progress import progress
from dalle_cli.sampling.batch_size import DECODED_AT_ONCE, MOST, free_memory, sampling_need
from dalle_cli.sampling.draw import sample_images
from dalle_cli.sampling.request import SampleRequest, shard_folder
from dalle_cli.stores.checkpoint import Checkpoint, check_belongs
from dalle_cli.stores.samples import STORE, SampleStore, manifest_line, png_name
from dalle_cli.stores.shards import WHOLE
from dalle_cli.text.bpe import Tokenizer


@dataclass
class _Models:
    """What draws, and what it reads: text ids (C, T), the empty caption's (T,), given tokens (C, P)."""

    decoder: Decoder
    dvae: DVAE
    eps: float
    text_ids: Tensor
    empty: Tensor
    given: Tensor

    def draw(self, request: SampleRequest, prompts: range, indices: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (B, grid, grid) uint16, log-likelihoods (B,) and pictures (B, S, S, 3) uint8 of those samples."""
        some = slice(prompts.start, prompts.stop)
        uniforms = request.uniforms(prompts, indices, self.decoder.image_length)
        tokens, scores = sample_images(
            self.decoder,
            self.text_ids[some],
            len(indices),
            uniforms.to(self.decoder.device),
            request.settings.model_copy(update={"batch_size": None}),
            self.given[some],
            empty=self.empty,
        )
        grids = tokens.flatten(0, 1).unflatten(-1, (self.decoder.grid, self.decoder.grid))
        pictures = [decode_pictures(self.dvae, part, self.eps).cpu().numpy() for part in grids.split(DECODED_AT_ONCE)]
        return grids.cpu().numpy().astype(np.uint16), scores.flatten().cpu().numpy(), np.concatenate(pictures)


@dataclass
class Sampler:
    """The models of one chain, checked to belong together."""

    prior_checkpoint: Checkpoint
    dvae_checkpoint: Checkpoint
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        check_belongs(self.prior_checkpoint, "dvae", self.dvae_checkpoint.identity, str(self.dvae_checkpoint.path))
        check_belongs(self.prior_checkpoint, "tokenizer", self.tokenizer.identity, self.tokenizer.name)

    def identity(self, request: SampleRequest) -> dict[str, Any]:
        """What decides the samples of a request, all shards alike; names the store's and the default folder's content.

        Raises:
            UserError: a given picture cannot be read.
        """
        max_pixels = self.dvae_checkpoint.recipe().data.max_pixels
        primes = request.prime.hashes(max_pixels) if request.prime else []
        return request.identity(self.prior_checkpoint, primes)

    def run(self, request: SampleRequest, out: Path) -> Iterator[dict[str, Any]]:
        """Draw, write ``out/samples.zarr`` and ``out/*.png``, and yield one manifest line a sample that is committed.

        A shard's go into ``shard_folder(out, shard)``. Lines come in the order of the samples, those of a batch at
        the latest when the next one is drawn.

        Raises:
            UserError: a prompt is empty or too long, a given picture cannot be read, guidance is asked of a prior
                that was trained without caption dropout, or the folder holds samples of another request.
        """
        text = self._text_ids(request)
        recipe = self.prior_checkpoint.recipe()
        self._require_dropout(request.settings)
        identity, folder = self.identity(request), shard_folder(out, request.shard)
        if request.shard != WHOLE:
            identity["shard"] = str(request.shard)
        if not request.rows:
            return
        store = SampleStore(folder, identity, len(request.rows), recipe.grid)
        row = request.rows.start + store.committed
        yield from _lines(request, folder, request.rows.start, store.log_likelihood())
        if row == request.rows.stop:
            return
        limit_threads(recipe)
        mend = "lower sampling.batch_size (--batch-size)"
        with explain_out_of_memory(folder, mend):
            models = self._load(request, text)
        size = samples_at_once(request, models.decoder, models.dvae)
        pending: list[tuple[int, np.ndarray, Future[None]]] = []
        total = len(request.rows)
        with progress("sample", total, "images", store.committed) as bar, explain_out_of_memory(folder, mend), store:
            while row < request.rows.stop:
                try:
                    tokens, scores, pictures = models.draw(request, *request.batch(row, size))
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size //= 2
                    bar.say(f"sample: the memory is full; goes on with {size} samples at once")
                    continue
                names = [png_name(*request.place(r)) for r in range(row, row + len(pictures))]
                pending.append((row, scores, store.add(row - request.rows.start, tokens, scores, pictures, names)))
                row += len(pictures)
                bar.advance(len(pictures))
                if len(pending) == 2:
                    yield from _committed(request, folder, *pending.pop(0))
            for batch in pending:
                yield from _committed(request, folder, *batch)

    def _load(self, request: SampleRequest, text: list[list[int]]) -> _Models:
        recipe, made_by, device = self.prior_checkpoint.recipe(), self.dvae_checkpoint.recipe(), choose_device()
        prior, dvae = load_prior(self.prior_checkpoint).to(device), load_dvae(self.dvae_checkpoint).to(device)
        text_ids = prior.with_padding(*(part.to(device) for part in text_tensors(text, recipe.tokenizer.text_length)))
        empty = prior.with_padding(torch.zeros_like(text_ids[:1]), torch.zeros(1, device=device))[0]
        return _Models(
            Decoder(prior, request.settings.precision),  # it has its own copy of the matrices
            dvae,
            made_by.dvae.objective.logit_laplace_eps,
            text_ids,
            empty,
            request.prime.tokens(dvae, made_by) if request.prime else text_ids[:, :0],
        )

    def _require_dropout(self, settings: SamplingSettings) -> None:
        if settings.guidance != 1 and not self.prior_checkpoint.recipe().prior.caption_dropout:
            raise UserError(
                f"{self.prior_checkpoint.path}: guidance {settings.guidance:g} needs a prior that has learned pictures "
                "without captions, and this one was trained with prior.caption_dropout: 0; train one with "
                "prior.caption_dropout: 0.1, or leave --guidance out"
            )

    def _text_ids(self, request: SampleRequest) -> list[list[int]]:
        length = self.prior_checkpoint.recipe().tokenizer.text_length
        for number, prompt in enumerate(request.prompts, start=1):
            try:
                clean_caption(prompt)
            except BadSample as error:
                raise UserError(f"prompt {number}: {error}; write what the picture shows") from None
        encoded = self.tokenizer.encode(request.prompts)
        for number, (prompt, ids) in enumerate(zip(request.prompts, encoded, strict=True), start=1):
            if len(ids) > length:
                raise UserError(
                    f"prompt {number} ({prompt[:40]!r}...) has {len(ids)} tokens, the prior reads {length}; shorten it"
                )
        return encoded


def samples_at_once(request: SampleRequest, decoder: Decoder, dvae: DVAE) -> int:
    """The batch's size: what memory holds, and no more than the request's ``batch_size``."""
    settings, device = request.settings, decoder.device
    given = request.prime.rows * decoder.grid if request.prime else 0
    need = sampling_need(decoder, dvae, settings.guidance != 1, given)
    fits = need.samples(free_memory(device), settings.n, MOST[device.type])
    return min(fits, settings.batch_size or fits)


def text_tensors(encoded: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Token lists as (n, length) int64, zero behind each caption's end, and their lengths (n,)."""
    text = torch.zeros(len(encoded), length, dtype=torch.int64)
    for row, ids in enumerate(encoded):
        text[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return text, torch.tensor([len(ids) for ids in encoded])


def _committed(
    request: SampleRequest, folder: Path, row: int, scores: np.ndarray, written: Future[None]
) -> Iterator[dict[str, Any]]:
    written.result()
    yield from _lines(request, folder, row, scores)


def _lines(request: SampleRequest, out: Path, first_row: int, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    for row, score in enumerate(scores, start=first_row):
        prompt, index = request.place(row)
        line = manifest_line(out / STORE, row - request.rows.start, request.prompts, prompt, index, request.seed, score)
        if request.ids is not None:
            line |= request.ids[prompt]
        if request.prime is not None:
            line |= {"prime": str(request.prime.pictures[prompt]), "prime_rows": request.prime.rows}
        yield line
