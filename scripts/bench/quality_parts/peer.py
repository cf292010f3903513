"""The PyPI package dalle-pytorch (lucidrains): its dVAE, transformer and CLIP, trained in the same time as our chain.

Its settings are the defaults of its training scripts (train_vae.py, train_dalle.py of version 1.6.6), except for sizes,
which are cut to what a CPU trains in minutes, a vocabulary of the data set's own captions, and the text's length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from prior_parts.peer import load_peer
from torch import Tensor, nn
from torchvision import transforms

from dalle_cli.config.schema import TokenizerSettings
from dalle_cli.data.images import decode_image, eval_crop
from dalle_cli.planning.budget import SHARES
from dalle_cli.text.bpe import train_bpe
from dalle_cli.text.encode import CaptionEncoder
from quality_parts.datasets import DataSet

SIZES: dict[str, dict[str, Any]] = {
    "dvae": {"num_layers": 3, "num_tokens": 512, "codebook_dim": 256, "hidden_dim": 64, "num_resnet_blocks": 1},
    "prior": {"dim": 256, "depth": 6, "heads": 4, "dim_head": 64},
    "clip": {"dim_text": 128, "dim_image": 128, "dim_latent": 128, "text_enc_depth": 2, "visual_enc_depth": 3},
}
BATCH = {"dvae": 8, "prior": 16, "clip": 64}
LEARNING_RATE = {"dvae": 1e-3, "prior": 3e-4, "clip": 3e-4}
DECAY, DECAY_EVERY = 0.98, 100
"""The learning rate of the dVAE is multiplied by DECAY after every DECAY_EVERY updates."""
CLIP_NORM = 0.5
TOP_SHARE = 0.9
"""``filter_thres`` of its generate.py: the share of the least likely tokens that are never drawn."""


@dataclass
class Peer:
    """The package's three models, trained on one data set."""

    data: DataSet
    image_size: int
    text: TokenizerSettings
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each stage's training."""
    updates: dict[str, int] = field(default_factory=dict)
    """Number of updates of each stage."""

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        package = load_peer()
        if package is None:
            raise ModuleNotFoundError("dalle-pytorch is not installed; start the benchmark by scripts/bench/quality")
        self.package: Any = package
        rows = self.data.rows(self.data.train)
        captions = (caption for row in rows for caption in row["captions"])
        self.encoder = CaptionEncoder(train_bpe(captions, self.text, self.data.root / "tokenizer"), self.text)
        self.pictures = [decode_image((self.data.root / row["path"]).read_bytes()) for row in rows]
        self.captions = [self.ids(row["captions"]) for row in rows]
        self.crop = transforms.RandomResizedCrop(self.image_size, scale=(0.75, 1.0), ratio=(1.0, 1.0))
        self.dvae = package.DiscreteVAE(image_size=self.image_size, **SIZES["dvae"])

    def ids(self, captions: list[str]) -> Tensor:
        """Return the tokens (n, text_length) of captions, padded with 0 as the package expects."""
        text, _ = self.encoder.encode(captions)
        return torch.from_numpy(text.astype(np.int64))

    def train(self, minutes: float) -> None:
        """Train the three models one after another, each for its share of ``minutes``."""
        package, text_length = self.package, self.text.text_length
        vocabulary = self.text.vocab_size
        self._stage("dvae", self.dvae, minutes, lambda images, _: self.dvae(images, return_loss=True))
        self.dalle = package.DALLE(
            vae=self.dvae, num_text_tokens=vocabulary, text_seq_len=text_length, **SIZES["prior"]
        )
        self._stage("prior", self.dalle, minutes, lambda images, text: self.dalle(text, images, return_loss=True))
        self.clip = package.CLIP(
            num_text_tokens=vocabulary, text_seq_len=text_length, visual_image_size=self.image_size,
            visual_patch_size=self.image_size // 8, **SIZES["clip"],
        )  # fmt: skip
        self._stage("clip", self.clip, minutes, lambda images, text: self.clip(text, images, return_loss=True))

    @property
    def settings(self) -> dict[str, Any]:
        """The sizes and rates of the three models, and the updates they had."""
        return {"sizes": SIZES, "batch": BATCH, "learning_rate": LEARNING_RATE, "updates": self.updates}

    @torch.inference_mode()
    def draw(self, captions: list[dict[str, Any]], n: int, out: Path) -> dict[str, Any]:
        """Reconstruct the captions' true pictures, and draw ``n`` samples of each caption, ranked by its own CLIP."""
        out.mkdir(parents=True, exist_ok=True)
        rebuilt, ranked, psnr, real = [], [], [], [self.data.root / row["path"] for row in captions]
        for path, row in zip(real, captions, strict=True):
            crop = eval_crop(decode_image(path.read_bytes()), self.image_size)
            pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None] / 255
            decoded = self._denormalized(self.dvae.decode(self.dvae.get_codebook_indices(pixels)))
            psnr.append(float(-10 * (decoded - pixels).square().mean().log10()))
            rebuilt.append(self._save(decoded[0], out / f"{row['id']}-rebuilt.png"))
        for row in captions:
            text = self.ids([row["caption"]]).expand(n, -1)
            drawn = self._denormalized(self.dalle.generate_images(text, filter_thres=TOP_SHARE, use_cache=True))
            scores = self.clip(text, drawn, return_loss=False).tolist()
            order = sorted(range(n), key=lambda i: -scores[i])
            ranked.append([
                {"index": i, "png": str(self._save(drawn[i], out / f"{row['id']}-{i}.png")), "rank": place + 1}
                for place, i in enumerate(order)
            ])  # fmt: skip
        return {"real": real, "rebuilt": rebuilt, "psnr": float(np.mean(psnr)), "ranked": ranked}

    def _stage(self, name: str, model: nn.Module, minutes: float, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        model.train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE[name])
        began, updates = time.perf_counter(), 0
        for images, text in self._batches(BATCH[name]):
            if time.perf_counter() - began > 60 * minutes * SHARES[name]:
                break
            optimizer.zero_grad()
            loss(images, text).backward()  # type: ignore[no-untyped-call]
            if name != "dvae":
                nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            updates += 1
            if name == "dvae" and updates % DECAY_EVERY == 0:
                for group in optimizer.param_groups:
                    group["lr"] *= DECAY
        model.eval()
        self.seconds[name], self.updates[name] = time.perf_counter() - began, updates

    def _batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random crops (size, 3, H, W) in 0..1 with the tokens of one caption of each, without end."""
        rng = np.random.default_rng(self.seed)
        while True:
            rows = rng.integers(len(self.pictures), size=size)
            images = torch.stack([transforms.functional.to_tensor(self.crop(self.pictures[row])) for row in rows])
            text = torch.stack([self.captions[row][rng.integers(len(self.captions[row]))] for row in rows])
            yield images, text

    def _denormalized(self, pictures: Tensor) -> Tensor:
        """Return pictures in 0..1 of the dVAE's own range."""
        return (pictures * 0.5 + 0.5).clamp(0, 1)

    def _save(self, picture: Tensor, path: Path) -> Path:
        Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
        return path
