"""A small CLIP (Radford et al. 2021, arXiv 2103.00020) of open_clip's classes that reads our BPE ids."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dalle_cli.config.schema import ClipModel
from dalle_cli.pretrained import PretrainedFeatures

if TYPE_CHECKING:
    from open_clip.model import CLIP

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue of pixels in [0, 1], as in published CLIPs."""

PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of red, green and blue of pixels in [0, 1]."""

MAX_LOGIT_SCALE = math.log(100)
"""Upper limit of the learned log-scale of similarities, as in CLIP's training."""

PAD = 0


class PretrainedTower(nn.Module):
    """A frozen pretrained network and a learned projection in place of the vision transformer.

    A few thousand pictures cannot teach a vision tower what pictures show, but they suffice to learn words for what a
    pretrained one sees (Zhai et al. 2022, "LiT", arXiv 2111.07991).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: PretrainedFeatures, embed_dim: int) -> None:
        super().__init__()
        self.features = features
        self.projection = nn.Linear(features.width, embed_dim)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map standardized pictures (B, 3, H, W), see :func:`pixels`, to vectors (B, embed_dim)."""
        vectors: Tensor = self.projection(self.features.pooled(x * self.std + self.mean))
        return vectors


def build_clip(
    settings: ClipModel, image_size: int, text_length: int, text_vocab: int, *, seed: int = 0, pretrained: bool = True
) -> CLIP:
    """Build a CLIP with random weights, for pictures of ``image_size`` px and captions of up to ``text_length`` tokens.

    With ``settings.vision``, the picture tower is that network, with its weights if ``pretrained``.

    Patches have sine-cosine positions, and their mean is the picture's feature. With little training, this learns
    positions far sooner than learned embeddings and a class token do (Beyer et al. 2022, arXiv 2205.01580).

    The vocabulary is the ``text_vocab`` BPE ids and one end-of-text id, ``text_vocab``. A caption's feature is taken at
    its end-of-text token, the highest id of its row. The text transformer is causal, so the padding after that token
    cannot affect the feature. The global random state is left unchanged.
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=settings.vision_layers,
        width=settings.vision_width,
        head_width=settings.head_width,
        patch_size=settings.patch_size,
        image_size=image_size,
        pos_embed_type="sin_cos_2d",
        pool_type="avg",
    )
    text = CLIPTextCfg(
        context_length=text_length + 1,
        vocab_size=text_vocab + 1,
        width=settings.text_width,
        heads=settings.text_width // settings.head_width,
        layers=settings.text_layers,
        pad_id=PAD,
        eos_id=text_vocab,
        pool_type="argmax",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(settings.embed_dim, vision, text)
        if settings.vision is not None:
            features = PretrainedFeatures(settings.vision, settings.vision_size, pretrained=pretrained)
            model.visual = PretrainedTower(features, settings.embed_dim)
        return model


def clip_text_ids(text: Tensor, length: Tensor, text_vocab: int) -> Tensor:
    """Return the text transformer's input, (B, T + 1) int64: tokens, end-of-text id ``text_vocab``, padding.

    Args:
        text: (B, T) BPE ids.
        length: (B,) number of tokens of each caption; ids after them are ignored.
        text_vocab: number of BPE ids, and the end-of-text id.
    """
    batch, positions = text.shape
    if length.shape != (batch,):
        raise ValueError(f"length has shape {tuple(length.shape)}, text {tuple(text.shape)}")
    position = torch.arange(positions + 1, device=text.device)
    end = length.to(torch.int64)[:, None]
    ids = torch.nn.functional.pad(text.to(torch.int64), (0, 1), value=PAD)
    ids = torch.where(position < end, ids, PAD)
    return torch.where(position == end, text_vocab, ids)


def pixels(x: Tensor) -> Tensor:
    """Return the vision transformer's input, (B, 3, H, W) standardized floats, of pictures (B, H, W, 3) uint8."""
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        raise TypeError(f"pictures are (B, H, W, 3) uint8, not {tuple(x.shape)} {x.dtype}")
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    planes = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(255).sub_(mean).div_(std)


def contrastive_loss(model: CLIP, images: Tensor, text_ids: Tensor, caption_negatives: bool = False) -> Tensor:
    """Return the symmetric cross-entropy of a batch of (image, caption) pairs.

    Equal captions in a batch count as mismatches, as in CLIP, so the loss stays above zero if captions repeat.

    Args:
        model: the CLIP.
        images: (B, 3, H, W) pictures, see :func:`pixels`.
        text_ids: (B, T + 1) captions, see :func:`clip_text_ids`.
        caption_negatives: add the batch's other captions to a caption's negatives. Without them, captions that differ
            only in relations collapse while image features do not encode relations yet, and then neither encoder can
            learn relations from the other.
    """
    image_features, text_features, scale = model(images, text_ids)
    similarities = scale * image_features @ text_features.T
    others = similarities.T
    if caption_negatives:
        equal = text_ids.new_ones(len(text_ids), len(text_ids), dtype=torch.bool)
        for ids in text_ids.T:  # torch.unique would have to wait for a GPU
            equal &= ids[:, None] == ids
        captions = (scale * text_features @ text_features.T).masked_fill(equal, -torch.inf)
        others = torch.cat([others, captions], dim=1)
    return pairs_cross_entropy(similarities, others)


def pairs_cross_entropy(of_images: Tensor, of_captions: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (B, B or more) of images and of captions; pairs are on the diagonal."""
    own = torch.arange(len(of_images), device=of_images.device)
    return (nn.functional.cross_entropy(of_images, own) + nn.functional.cross_entropy(of_captions, own)) / 2


@torch.no_grad()
def clamp_logit_scale(model: CLIP) -> None:
    """Clamp the learned scale of similarities to [1, 100]; called after each update."""
    model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
