"""Our own CLIP as a scorer, and the choice between it and a published one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dalle_cli.clip.model import clip_text_ids, pixels
from dalle_cli.clip.scorer import SCHEMAS, ModelScorer
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


class OwnScorer(ModelScorer):
    """Our own CLIP; pictures of other sizes than ``image_size`` are cropped and resized."""

    def __init__(self, model: CLIP, encoder: CaptionEncoder, image_size: int, *, name: str = "clip") -> None:
        super().__init__(model, name)
        self.encoder = encoder
        self.image_size = image_size

    @property
    def captions_cut(self) -> int:
        return self.encoder.cut

    @cached_property
    def identity(self) -> str:
        return weights_hash(self.model, str(self.image_size))

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        ids, length = map(torch.from_numpy, self.encoder.encode(list(captions)))
        return clip_text_ids(ids, length, self.model.vocab_size - 1)

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        # from_numpy needs a contiguous, writable array; np.require copies others.
        return torch.from_numpy(np.require(self._sized(picture), requirements=["C", "W"]))

    def pixels(self, prepared: Tensor) -> Tensor:
        return pixels(prepared)

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
) -> ModelScorer:
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
