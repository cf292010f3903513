"""What to draw, and what of it decides the samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_cli.config.schema import Recipe, SamplingSettings
from dalle_cli.data.images import BadImage, decode_image, eval_crop
from dalle_cli.data.source import BadSample, read_image_file
from dalle_cli.dvae.encode import BLOCK, encode_pictures
from dalle_cli.dvae.model import DVAE
from dalle_cli.errors import UserError
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.samples import request_rows
from dalle_cli.stores.shards import WHOLE, Shard, parts_folder


@dataclass(frozen=True)
class Prime:
    """Pictures whose first ``rows`` rows of tokens are given (image-to-image), one for each prompt."""

    pictures: Sequence[Path]
    rows: int
    _hashes: dict[int, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def hashes(self, max_pixels: int) -> list[str]:
        """sha256 of each picture's file.

        Raises:
            UserError: one cannot be read as a picture.
        """
        if max_pixels not in self._hashes:
            found = {
                path: hashlib.sha256(_content(path, max_pixels)[0]).hexdigest() for path in dict.fromkeys(self.pictures)
            }
            self._hashes[max_pixels] = [found[path] for path in self.pictures]
        return self._hashes[max_pixels]

    def tokens(self, dvae: DVAE, recipe: Recipe) -> Tensor:
        """The given tokens, (C, rows * grid) int64 on the dVAE's device, of the pictures as evaluation cuts them."""
        distinct = list(dict.fromkeys(self.pictures))
        device, eps = next(dvae.parameters()).device, recipe.dvae.objective.logit_laplace_eps
        encoded = []
        for begin in range(0, len(distinct), BLOCK):
            block = [_content(path, recipe.data.max_pixels)[1] for path in distinct[begin : begin + BLOCK]]
            cut = np.stack([eval_crop(picture, recipe.image_size) for picture in block])
            encoded.append(encode_pictures(dvae, torch.from_numpy(cut).to(device), eps)[:, : self.rows].flatten(1))
        place = {path: number for number, path in enumerate(distinct)}
        return torch.cat(encoded)[[place[path] for path in self.pictures]]


def _content(path: Path, max_pixels: int) -> tuple[bytes, Image.Image]:
    try:
        content = read_image_file(path)
        return content, decode_image(content, max_pixels)
    except (BadImage, BadSample) as error:
        raise UserError(f"{path}: cannot be read as the picture whose rows are given ({error})") from None


def parse_rows(text: str, grid: int) -> int:
    """``--prime-rows``: rows of tokens such as ``16``, or a share of the picture below 1 such as ``0.5``.

    Raises:
        UserError: it is neither, gives nothing, or leaves nothing to draw.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    rows = round(value * grid) if 0 < value < 1 else int(value) if value.is_integer() else 0
    if not 0 < rows < grid:
        raise UserError(
            f"--prime-rows {text}: give rows of tokens from 1 to {grid - 1}, or a share of the picture that comes to "
            f"as many, such as 0.5 for {grid // 2}"
        )
    return rows


@dataclass(frozen=True)
class SampleRequest:
    """What to draw: samples ``first`` to ``first + settings.n - 1`` of each prompt, or a ``shard`` of them all.

    ``ids`` go into each prompt's manifest lines.
    """

    prompts: list[str]
    settings: SamplingSettings
    seed: int
    first: int = 0
    prime: Prime | None = None
    ids: Sequence[dict[str, str | int]] | None = None
    shard: Shard = WHOLE

    def __post_init__(self) -> None:
        count = len(self.prompts)
        if self.ids is not None and len(self.ids) != count:
            raise ValueError(f"{len(self.ids)} ids for {count} prompts")
        if self.prime is not None and len(self.prime.pictures) != count:
            raise ValueError(f"{len(self.prime.pictures)} pictures for {count} prompts")

    @property
    def rows(self) -> range:
        """The samples to draw, counted through all prompts."""
        return request_rows(self.shard, len(self.prompts), self.settings.n)

    def place(self, row: int) -> tuple[int, int]:
        """(prompt, index of the sample) of a row."""
        prompt, index = divmod(row, self.settings.n)
        return prompt, self.first + index

    def batch(self, row: int, size: int) -> tuple[range, range]:
        """The prompts and the indices of up to ``size`` samples to draw together from ``row`` on.

        Some of one prompt's, or all of several prompts'; what comes first is never left for later.
        """
        n, stop = self.settings.n, self.rows.stop
        prompt, begin = divmod(row, n)
        if begin or size < n or stop - row < n:
            end = min(begin + size, n, begin + stop - row)
            return range(prompt, prompt + 1), range(self.first + begin, self.first + end)
        together = min(size, stop - row) // n
        return range(prompt, prompt + together), range(self.first, self.first + n)

    def identity(self, prior: Checkpoint, primes: Sequence[str] = ()) -> dict[str, Any]:
        """What decides the samples, for the store's attributes and the default folder's name.

        ``primes`` are the sha256 of the given pictures. What is not asked for is not named.
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
            named["prime"] = {"rows": self.prime.rows, "pictures": list(primes)}
        return named

    def uniforms(self, prompts: range, indices: range, positions: int) -> Tensor:
        """Uniform numbers (prompts, indices, positions) float64, each sample's from (seed, prompt's text, index)."""
        rows = [
            [numpy_generator(self.seed, "sample", self.prompts[p], index).random(positions) for index in indices]
            for p in prompts
        ]
        return torch.from_numpy(np.array(rows))


def default_folder(samples: Path, identity: dict[str, Any]) -> Path:
    """A folder of its own for each request, so that the same command finds what it drew before."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return samples / digest[:12]


def shard_folder(whole: Path, shard: Shard) -> Path:
    """Where a shard of the request whose folder is ``whole`` is drawn: ``WHOLE.parts/samples-0003-of-0008``."""
    return whole if shard == WHOLE else parts_folder(whole) / f"samples-{shard.number:04d}-of-{shard.of:04d}"
