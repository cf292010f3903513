"""Requests for samples: captions, settings and given pictures, and the hash that names a request's folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dalle_cli.config.schema import Recipe, SamplingSettings
from dalle_cli.data.images import eval_crop, read_picture
from dalle_cli.dvae.encode import BLOCK, encode_images
from dalle_cli.dvae.model import DVAE
from dalle_cli.errors import UserError
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.files import sha256_file
from dalle_cli.stores.samples import request_rows
from dalle_cli.stores.shards import WHOLE, Shard, parts_folder


@dataclass(frozen=True)
class Prime:
    """A picture for each prompt whose first ``rows`` rows of tokens are given (image-to-image)."""

    pictures: Sequence[Path]
    rows: int
    max_pixels: int

    @cached_property
    def hashes(self) -> list[str]:
        """SHA-256 of each picture's file."""
        found = {}
        for path in dict.fromkeys(self.pictures):
            self._read(path)
            found[path] = sha256_file(path)
        return [found[path] for path in self.pictures]

    def tokens(self, dvae: DVAE, recipe: Recipe) -> Tensor:
        """Return the given tokens, (C, rows * grid) int64 on the dVAE's device, of pictures cropped for encoding."""
        distinct = list(dict.fromkeys(self.pictures))
        device, eps = next(dvae.parameters()).device, recipe.dvae.objective.logit_laplace_eps
        encoded = []
        for begin in range(0, len(distinct), BLOCK):
            cut = [
                eval_crop(self._read(path), recipe.image_size, recipe.data.fit)
                for path in distinct[begin : begin + BLOCK]
            ]
            pictures = torch.from_numpy(np.stack(cut)).to(device)
            encoded.append(encode_images(dvae, pictures, eps)[:, : self.rows].flatten(1))
        index = {path: number for number, path in enumerate(distinct)}
        return torch.cat(encoded)[[index[path] for path in self.pictures]]

    def _read(self, path: Path) -> Image.Image:
        return Image.fromarray(read_picture(path, "name a picture whose rows are given", self.max_pixels))


def choose_prime(pictures: Sequence[Path | None], rows: str | None, grid: int, max_pixels: int) -> Prime | None:
    """Combine the prompts' pictures (``--prime``) with ``--prime-rows``; return None if neither is given.

    Raises:
        UserError: pictures come without rows, rows without pictures, or only some prompts have a picture.
    """
    named = [picture for picture in pictures if picture is not None]
    if not named and rows is None:
        return None
    if not named:
        raise UserError(
            "--prime-rows: no picture is given; name it with --prime, or as prime in the JSON lines of --captions"
        )
    if rows is None:
        raise UserError("--prime: the number of given rows is missing; set it with --prime-rows, such as 0.5")
    if len(named) < len(pictures):
        raise UserError(f"prompt {pictures.index(None) + 1}: has no prime but others do; give one for all with --prime")
    return Prime(named, parse_rows(rows, grid), max_pixels)


def parse_rows(text: str, grid: int) -> int:
    """Parse ``--prime-rows``: rows of tokens such as ``16``, or a share of the picture below 1 such as ``0.5``.

    Raises:
        UserError: it is neither, gives no row, or leaves none to draw.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    rows = round(value * grid) if 0 < value < 1 else int(value) if value.is_integer() else 0
    if not 0 < rows < grid:
        raise UserError(
            f"--prime-rows {text}: give from 1 to {grid - 1} rows of tokens, or a share of the picture, such as 0.5 "
            f"for {grid // 2} rows"
        )
    return rows


@dataclass(frozen=True)
class SampleRequest:
    """Request for samples ``first`` to ``first + settings.n - 1`` of each prompt, or for a shard of them all."""

    prompts: list[str]
    settings: SamplingSettings
    seed: int
    first: int = 0
    prime: Prime | None = None
    ids: Sequence[dict[str, str | int]] | None = None
    """Ids of each prompt, copied into its sample lines."""
    shard: Shard = WHOLE

    def __post_init__(self) -> None:
        count = len(self.prompts)
        if self.ids is not None and len(self.ids) != count:
            raise ValueError(f"{len(self.ids)} ids for {count} prompts")
        if self.prime is not None and len(self.prime.pictures) != count:
            raise ValueError(f"{len(self.prime.pictures)} pictures for {count} prompts")

    @property
    def rows(self) -> range:
        """Rows of the samples to draw, numbered through all prompts."""
        return request_rows(self.shard, len(self.prompts), self.settings.n)

    def place(self, row: int) -> tuple[int, int]:
        """Return the prompt and the sample's index of a row."""
        prompt, index = divmod(row, self.settings.n)
        return prompt, self.first + index

    def batch(self, row: int, size: int) -> tuple[range, range]:
        """Return the prompts and sample indices of the next batch, of up to ``size`` samples from ``row`` on.

        A batch has some samples of one prompt, or all samples of several prompts.
        """
        n, stop = self.settings.n, self.rows.stop
        prompt, begin = divmod(row, n)
        if begin or size < n or stop - row < n:
            end = min(begin + size, n, begin + stop - row)
            return range(prompt, prompt + 1), range(self.first + begin, self.first + end)
        prompts = min(size, stop - row) // n
        return range(prompt, prompt + prompts), range(self.first, self.first + n)

    def batches_from(self, row: int, size: int) -> Iterator[range]:
        """Yield the rows of each ``batch`` of up to ``size`` samples, from ``row`` on."""
        while row < self.rows.stop:
            prompts, indices = self.batch(row, size)
            yield range(row, row + len(prompts) * len(indices))
            row += len(prompts) * len(indices)

    def identity(self, prior: Checkpoint) -> dict[str, Any]:
        """Return everything that decides the samples, the same for all shards, without unused options.

        It is the store's ``request`` attribute, and its hash names the default folder.

        Raises:
            UserError: a given picture cannot be read.
        """
        settings = self.settings.model_dump(exclude={"batch_size"})
        if self.settings.guidance == 1:
            del settings["guidance"]
        named: dict[str, Any] = {
            "prior": prior.identity, "prompts": self.prompts, "seed": self.seed, "settings": settings
        }  # fmt: skip
        if self.first:
            named["first"] = self.first
        if self.prime is not None:
            named["prime"] = {"rows": self.prime.rows, "pictures": self.prime.hashes}
        if any(self._occurrences):
            named["equal_prompts"] = "differ"  # earlier versions drew the same samples for equal prompts
        return named

    @cached_property
    def _occurrences(self) -> list[int]:
        """Number of equal prompts before each prompt."""
        seen: Counter[str] = Counter()
        found = []
        for prompt in self.prompts:
            found.append(seen[prompt])
            seen[prompt] += 1
        return found

    def uniforms(self, prompts: range, indices: range, positions: int) -> Tensor:
        """Return uniform numbers (prompts, indices, positions) float64, seeded by (seed, prompt's text, index).

        They do not depend on the other prompts, but a prompt that occurs again has others the second time.
        """

        def draw(p: int, index: int) -> NDArray[np.float64]:
            again = ("again", self._occurrences[p]) if self._occurrences[p] else ()
            return numpy_generator(self.seed, "sample", self.prompts[p], index, *again).random(positions)

        return torch.from_numpy(np.array([[draw(p, index) for index in indices] for p in prompts]))


def default_folder(samples: Path, identity: dict[str, Any]) -> Path:
    """Return the folder in ``samples`` that is named by the hash of a request's ``identity``."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return samples / digest[:12]


def shard_folder(whole: Path, shard: Shard) -> Path:
    """Return a shard's folder, such as ``OUT.parts/samples-0003-of-0008``; ``whole`` itself if there is one shard."""
    return whole if shard == WHOLE else parts_folder(whole) / f"samples-{shard.number:04d}-of-{shard.of:04d}"
