"""Captions to pictures on disk: tokens drawn from the prior, decoded by the dVAE, one PNG and one line a sample.

A sample is a function of (models, settings, seed, prompt, index): its random numbers are drawn from those, so any
sample can be drawn again alone, and a killed job goes on where it stopped with the same pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_cli.data.samples import BadSample, clean_caption
from dalle_cli.dvae.encode import decode_pictures
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.train import load_prior
from dalle_cli.progress import progress
from dalle_cli.randomness import numpy_generator
from dalle_cli.recipes.schema import SamplingSettings
from dalle_cli.sampling.draw import sample_images
from dalle_cli.stores.checkpoint import Checkpoint, check_belongs
from dalle_cli.stores.files import explain_os_errors, new_directory
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.training.device import choose_device, explain_out_of_memory, limit_threads

STORE = "samples.zarr"


@dataclass(frozen=True)
class SampleRequest:
    """What to draw: ``settings.n`` samples of each prompt."""

    prompts: list[str]
    settings: SamplingSettings
    seed: int

    def identity(self, prior: Checkpoint) -> dict[str, Any]:
        """What decides the samples, for the store's attributes and the default folder's name."""
        settings = self.settings.model_dump(exclude={"batch_size"})
        return {"prior": prior.identity, "prompts": self.prompts, "seed": self.seed, "settings": settings}


def default_folder(samples: Path, request: SampleRequest, prior: Checkpoint) -> Path:
    """A folder of its own for each request, so that the same command finds what it drew before."""
    digest = hashlib.sha256(json.dumps(request.identity(prior), sort_keys=True).encode()).hexdigest()
    return samples / digest[:12]


@dataclass
class Sampler:
    """The models of one chain, checked to belong together."""

    prior_checkpoint: Checkpoint
    dvae_checkpoint: Checkpoint
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        check_belongs(self.prior_checkpoint, "dvae", self.dvae_checkpoint.identity, str(self.dvae_checkpoint.path))
        check_belongs(self.prior_checkpoint, "tokenizer", self.tokenizer.identity, self.tokenizer.name)

    def run(self, request: SampleRequest, out: Path) -> Iterator[dict[str, Any]]:
        """Draw, write ``out/samples.zarr`` and ``out/*.png``, and yield one manifest line a sample as it is committed.

        Raises:
            UserError: a prompt is empty or too long, or ``out`` holds samples of another request.
        """
        text = self._text_ids(request)
        recipe = self.prior_checkpoint.recipe()
        store = _open_store(out, request.identity(self.prior_checkpoint), len(text) * request.settings.n, recipe.grid)
        n, total = request.settings.n, len(text) * request.settings.n
        committed = int(store.attrs["rows"])
        yield from _lines(request, out, 0, store["log_likelihood"][:committed])
        if committed == total:
            return
        limit_threads(recipe)
        device = choose_device()
        prior, dvae = load_prior(self.prior_checkpoint).to(device), load_dvae(self.dvae_checkpoint).to(device)
        eps = self.dvae_checkpoint.recipe().dvae.objective.logit_laplace_eps
        text_ids = prior.with_padding(*(part.to(device) for part in text_tensors(text, recipe.tokenizer.text_length)))
        decoder = Decoder(prior, request.settings.precision)
        del prior  # the decoder has its own copy of the matrices
        mend = "lower sampling.batch_size (--batch-size)"
        with progress("sample", total, "samples", committed) as bar, explain_out_of_memory(out, mend):
            while committed < total:
                prompts, samples = _next_batch(request, committed)
                uniforms = torch.cat([sample_uniforms(request, p, samples, recipe.grid**2) for p in prompts])
                tokens, scores = sample_images(
                    decoder,
                    text_ids[prompts.start : prompts.stop],
                    len(samples),
                    uniforms.to(device),
                    request.settings,
                )
                grid_tokens = tokens.flatten(0, 1).unflatten(-1, (recipe.grid, recipe.grid))
                log_likelihood = scores.flatten().cpu().numpy()
                pictures = decode_pictures(dvae, grid_tokens, eps).cpu().numpy()
                rows = slice(committed, committed + len(pictures))
                with explain_os_errors(out):
                    for row, picture in enumerate(pictures, start=committed):
                        Image.fromarray(picture).save(out / png_name(*divmod(row, n)))
                    store["tokens"][rows] = grid_tokens.cpu().numpy().astype(np.uint16)
                    store["log_likelihood"][rows] = log_likelihood
                    store.attrs["rows"] = rows.stop
                yield from _lines(request, out, committed, log_likelihood)
                committed = rows.stop
                bar.advance(len(pictures))

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


def _next_batch(request: SampleRequest, row: int) -> tuple[range, range]:
    """The prompts and the indices of the samples to draw together from ``row`` on: some of one prompt's, or all of
    several prompts'."""
    n, size = request.settings.n, request.settings.batch_size
    prompt, first = divmod(row, n)
    together = 1 if first else max(1, size // n)
    return range(prompt, min(prompt + together, len(request.prompts))), range(first, min(first + size, n))


def sample_uniforms(request: SampleRequest, prompt: int, indices: range, positions: int) -> Tensor:
    """Uniform numbers (1, len(indices), positions) float64, from (seed, prompt, index) alone."""
    rows = [
        numpy_generator(request.seed, "sample", request.prompts[prompt], index).random(positions) for index in indices
    ]
    return torch.from_numpy(np.stack(rows))[None]


def text_tensors(encoded: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Token lists as (n, length) int64, zero behind each caption's end, and their lengths (n,)."""
    text = torch.zeros(len(encoded), length, dtype=torch.int64)
    for row, ids in enumerate(encoded):
        text[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return text, torch.tensor([len(ids) for ids in encoded])


def png_name(prompt: int, index: int) -> str:
    """File name of a sample, sorted by prompt and index."""
    return f"{prompt:05d}-{index:05d}.png"


def _open_store(out: Path, identity: dict[str, Any], rows: int, grid: int) -> Any:
    import zarr

    if out.exists():
        if not (out / STORE / "zarr.json").is_file():
            raise UserError(f"{out}: exists and holds no samples; choose another --out")
        store = zarr.open_group(str(out / STORE), mode="a", zarr_format=3)
        if store.attrs.get("request") != json.loads(json.dumps(identity)):
            raise UserError(f"{out}: holds samples of other prompts, settings or models; choose another --out")
        return store
    with new_directory(out) as folder:
        store = zarr.open_group(str(folder / STORE), mode="a", zarr_format=3)
        chunk = min(rows, 64)
        store.create_array("tokens", shape=(rows, grid, grid), chunks=(chunk, grid, grid), dtype="uint16")
        store.create_array("log_likelihood", shape=(rows,), chunks=(chunk,), dtype="float64")
        store.attrs.update({"format": "dalle-samples", "version": 1, "rows": 0, "request": identity})
    return zarr.open_group(str(out / STORE), mode="a", zarr_format=3)


def _lines(request: SampleRequest, out: Path, first_row: int, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    for row, score in enumerate(scores, start=first_row):
        prompt, index = divmod(row, request.settings.n)
        yield {
            "prompt": request.prompts[prompt],
            "prompt_index": prompt,
            "index": index,
            "png": str(out / png_name(prompt, index)),
            "store": str(out / STORE),
            "row": row,
            "seed": request.seed,
            "log_likelihood": round(float(score), 4),
        }
