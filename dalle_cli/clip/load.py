"""Finding the CLIP that a command names: our own run, a published model, or the one beside the samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dalle_cli.clip.scoring import OpenClipScorer, OwnScorer, Scorer
from dalle_cli.clip.train import load_clip
from dalle_cli.config.run_folders import run_of
from dalle_cli.distributed.device import limit_threads
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import check_belongs, open_checkpoint
from dalle_cli.text.bpe import Tokenizer


def load_scorer(
    clip: str | None,
    pretrained: str | None,
    tokenizer: Path | None,
    beside: Path,
    device: torch.device | str = "cpu",
) -> Scorer:
    """The scorer of ``--clip`` and ``--pretrained``; without them, the CLIP of the run that ``beside`` lies in.

    It computes on ``device``.

    Raises:
        UserError: there is none, or the tokenizer is not the one it was trained with.
    """
    if pretrained is not None or (clip is not None and clip.startswith(("hf-hub:", "local-dir:"))):
        if clip is None:
            raise UserError("--pretrained needs --clip with the open_clip model's name, such as ViT-B-32")
        return OpenClipScorer(clip, pretrained or "", device=str(device))
    folder = Path(clip) if clip is not None else run_of(beside).clip
    if not folder.exists():
        raise UserError(
            f"{folder}: no CLIP there; train one with dalle train-clip, or give --clip MODEL --pretrained TAG|FILE"
        )
    checkpoint = open_checkpoint(folder, "clip")
    bpe = Tokenizer.load(tokenizer or run_of(checkpoint.path).tokenizer)
    check_belongs(checkpoint, "tokenizer", bpe.identity, bpe.name)
    recipe = checkpoint.recipe()
    limit_threads(recipe)
    length = recipe.tokenizer.text_length

    def tokenize(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        text, lengths = np.zeros((len(captions), length), np.int64), np.zeros(len(captions), np.int64)
        for row, ids in enumerate(bpe.encode(captions)):
            lengths[row] = min(len(ids), length)
            text[row, : lengths[row]] = ids[:length]
        return text, lengths

    name = f"{checkpoint.path} sha256:{checkpoint.identity[:12]}"
    return OwnScorer(load_clip(checkpoint).to(device), tokenize, recipe.image_size, name=name)
