"""Scores of how well a picture matches a caption, by our own CLIP or a published one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dalle_cli.clip.model import clip_text_ids, pixels
from dalle_cli.clip.train import load_clip
from dalle_cli.config.run_folders import run_of
from dalle_cli.distributed.device import use_settings
from dalle_cli.errors import UserError
from dalle_cli.pretrained import weights_hash
from dalle_cli.stores.checkpoint import Which, check_belongs, open_stage
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.encode import CaptionEncoder

if TYPE_CHECKING:
    from open_clip.model import CLIP

Pictures = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
"""Pictures (H, W, 3) uint8 in a list (sizes may differ), or one array (n, H, W, 3)."""

BATCH = 128
SCHEMAS = ("hf-hub:", "local-dir:")
"""Beginnings of names that give a published model and its weights at once."""


class Scorer(Protocol):
    """A CLIP for reranking and evaluation. Its features are unit vectors, float32, on the CPU."""

    @property
    def name(self) -> str:
        """Name of the model, for outputs with its scores."""
        ...

    @property
    def identity(self) -> str:
        """Hash of the weights and the picture preprocessing, for caches of features."""
        ...

    @property
    def logit_scale(self) -> float:
        """Learned factor that turns cosine similarities into logits."""
        ...

    @property
    def captions_cut(self) -> int:
        """Number of captions cut so far to the model's number of tokens; 0 if unknown."""
        ...

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Return the unit vectors of n captions, (n, d)."""
        ...

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """Prepare a picture (H, W, 3) for ``prepared_features``; safe to call from several threads."""
        ...

    def prepared_features(self, prepared: Sequence[Tensor]) -> Tensor:
        """Return the unit vectors of n prepared pictures, (n, d), computed as one batch."""
        ...

    def image_features(self, pictures: Pictures) -> Tensor:
        """Return the unit vectors of n pictures, (n, d), computed in batches."""
        ...


class OwnScorer:
    """Our own CLIP; pictures of other sizes than ``image_size`` are cropped and resized."""

    def __init__(self, model: CLIP, encoder: CaptionEncoder, image_size: int, *, name: str = "clip") -> None:
        self.model = model.eval()
        self.encoder = encoder
        self.image_size = image_size
        self.name = name

    @property
    def captions_cut(self) -> int:
        return self.encoder.cut

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        end_of_text = self.model.vocab_size - 1
        device = self.model.logit_scale.device
        features = []
        for chunk in in_chunks(captions):
            ids, length = map(torch.from_numpy, self.encoder.encode(list(chunk)))
            ids = clip_text_ids(ids, length, end_of_text).to(device)
            features.append(self.model.encode_text(ids, normalize=True).float().cpu())
        return joined(features)

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        # from_numpy needs a contiguous, writable array; np.require copies others.
        return torch.from_numpy(np.require(self._sized(picture), requirements=["C", "W"]))

    @torch.inference_mode()
    def prepared_features(self, prepared: Sequence[Tensor]) -> Tensor:
        batch = pixels(torch.stack(list(prepared)).to(self.model.logit_scale.device))
        features: Tensor = self.model.encode_image(batch, normalize=True).float().cpu()
        return features

    def image_features(self, pictures: Pictures) -> Tensor:
        return joined([self.prepared_features([*map(self.prepare, chunk)]) for chunk in in_chunks(pictures)])

    @cached_property
    def identity(self) -> str:
        return weights_hash(self.model, str(self.image_size))

    def _sized(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = (self.image_size, self.image_size)
        if picture.shape == (*size, 3):
            return picture
        return np.asarray(ImageOps.fit(Image.fromarray(picture), size, Image.Resampling.BICUBIC))


def load_scorer(
    clip: str | None,
    pretrained: str | None,
    tokenizer: Path | None,
    beside: Path,
    device: torch.device | str = "cpu",
    which: Which = "best",
) -> Scorer:
    """Load the scorer for a command's options ``--clip``, ``--pretrained`` and ``--tokenizer``.

    By default this is the CLIP of the run that has ``beside``, such as a sample, with the tokenizer of its run.

    Raises:
        UserError: there is no such CLIP, or the tokenizer is not the one it was trained with.
    """
    if clip is not None and (pretrained is not None or clip.startswith(SCHEMAS)):
        from dalle_cli.clip.published import OpenClipScorer

        return OpenClipScorer(clip, pretrained or "", device=str(device))
    folder = Path(clip) if clip is not None else run_of(beside).clip
    if not folder.exists():
        raise UserError(
            f"{folder}: no CLIP there; train one with dalle train-clip, or give --clip MODEL --pretrained TAG|FILE"
        )
    checkpoint = open_stage(folder, "clip", which)
    bpe = Tokenizer.load(tokenizer or run_of(checkpoint.path).tokenizer)
    check_belongs(checkpoint, "tokenizer", bpe.identity, bpe.name)
    recipe = checkpoint.recipe()
    use_settings(recipe)
    # The end of the path, such as quickstart/clip/step-00001050, is the same from every folder and on every machine.
    name = f"{Path(*checkpoint.path.resolve().parts[-3:])} sha256:{checkpoint.identity[:12]}"
    encoder = CaptionEncoder(bpe, recipe.tokenizer)
    return OwnScorer(load_clip(checkpoint).to(device), encoder, recipe.image_size, name=name)


def in_chunks(items: Sequence[Any] | NDArray[np.uint8]) -> Iterator[Sequence[Any] | NDArray[np.uint8]]:
    """Cut captions or pictures into parts of BATCH."""
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def joined(features: list[Tensor]) -> Tensor:
    """Join the features of all parts; raise ValueError if there are none."""
    if not features:
        raise ValueError("nothing to score: no captions or pictures were given")
    return torch.cat(features)
