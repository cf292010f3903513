"""The prior: a sparse transformer over one stream of text and image tokens (paper, section 2.2 and appendix B).

The stream has T text positions, then S = grid x grid image positions in raster order. It has no start token: each
position predicts the next, so the last text position predicts the first image token, and the first text token is given.
Residual stream, embeddings, gains, biases and heads stay in 32 bit; a resblock computes in the type of its matrices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dalle_cli.config.layout import AttentionKind
from dalle_cli.config.schema import PriorModel, Recipe
from dalle_cli.precision.gradient_scaling import scaled_residual
from dalle_cli.prior.attention import attend
from dalle_cli.prior.head_loss import head_loss
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.transfers import send

if TYPE_CHECKING:
    from dalle_cli.prior.flex_attention import FlexAttention

INIT_STD = 0.02
Precision = Literal["fp32", "bf16", "fp16"]

InitialValue = Callable[[str, Tensor], Tensor]
"""Function that returns the initial value of a parameter, given its name and its random value."""


class PriorLoss(NamedTuple):
    """Mean cross-entropies in nats, of the counted text positions and of the image tokens."""

    text: Tensor
    image: Tensor


class Linear(nn.Module):
    """y = W x + b, computed in ``computes_in`` or else the type of ``weight`` (out, in), whatever those of x and b."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.computes_in: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        kind = self.computes_in or self.weight.dtype
        x = x.to(kind)
        if x.device.type == "cpu" and kind == torch.float32 and not torch.is_autocast_enabled("cpu"):
            # Faster than PyTorch's product with a bias, which writes the bias to the result first and reads it again.
            return F.linear(x, self.weight).add_(self.bias)
        return F.linear(x, self.weight.to(kind), self.bias.to(kind))


class Head(Linear):
    """Logits over a vocabulary, or with ``targets`` the sum of the cross-entropies against them."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(x) if targets is None else head_loss(x, self.weight, self.bias, targets)


class Resblock(nn.Module):
    """A residual block x + branch(x), both (B, A, d); subclasses define the branch, which begins with the layer norm.

    If ``gradient_scale`` is set, the backward pass through the branch runs on gradients multiplied by it; see
    ``precision/gradient_scaling.py``. ``compiled_branch`` is a faster way to compute the branch in training, if there
    is one; see ``prior/on_gpu.py``.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.gradient_scale: Tensor | float | None = None
        self.compiled_branch: Callable[[Tensor], Tensor] | None = None

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        # Batches differ in size outside training, and each size would be compiled anew.
        branch = self.compiled_branch if self.compiled_branch and torch.is_grad_enabled() else self.branch
        if self.gradient_scale is None:
            return x + branch(x)
        return scaled_residual(branch, x, self.gradient_scale)


class AttentionResblock(Resblock):
    """A residual block of multi-head attention of one kind, by ``flex`` if that is set; see ``prior/on_gpu.py``."""

    def __init__(self, model: PriorModel, kind: AttentionKind, text_length: int) -> None:
        super().__init__(model.d_model)
        self.kind = kind
        self.heads, self.grid, self.conv_kernel = model.heads, model.grid, model.conv_kernel
        self.text_length = text_length
        self.flex: FlexAttention | None = None
        self.qkv = Linear(model.d_model, 3 * model.d_model)
        self.out = Linear(model.d_model, model.d_model)

    def branch(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        if self.flex is not None:
            mixed = self.flex(qkv)
        else:
            mixed = attend(self.kind, qkv, self.text_length, self.grid, self.conv_kernel)
        return self.out(mixed.flatten(2))  # type: ignore[no-any-return]


class MlpResblock(Resblock):
    """A residual block of a GELU MLP of four times the width."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.up = Linear(d_model, 4 * d_model)
        self.out = Linear(4 * d_model, d_model)

    def branch(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Prior(nn.Module):
    """The sparse transformer. A layer is two ``resblocks``, attention and MLP.

    Args:
        model: sizes and layout.
        text_length: T, the number of text positions.
        text_vocab: number of BPE tokens; ids from ``text_vocab`` on are padding tokens, one for each text position.
        image_vocab: size of the dVAE's codebook.
        seed: seed of the initial weights. A prior built on the meta device is not initialized.
        initial: returns a parameter's initial value, given its name and its random value; None: all are random, as
            in the paper.
    """

    def __init__(
        self,
        model: PriorModel,
        text_length: int,
        text_vocab: int,
        image_vocab: int,
        seed: int = 0,
        initial: InitialValue | None = None,
    ) -> None:
        super().__init__()
        if text_length < 1:
            raise ValueError(f"text_length {text_length} is below 1: the last text position predicts the first token")
        self.model = model
        self.text_length, self.text_vocab, self.image_vocab = text_length, text_vocab, image_vocab
        self.image_length = model.grid**2
        self._initial = initial
        d = model.d_model
        self.text_embedding = nn.Parameter(torch.empty(text_vocab + text_length, d))
        self.text_position = nn.Parameter(torch.empty(text_length, d))
        self.image_embedding = nn.Parameter(torch.empty(image_vocab, d))
        self.image_row = nn.Parameter(torch.empty(model.grid, d))
        self.image_column = nn.Parameter(torch.empty(model.grid, d))
        self.resblocks = nn.ModuleList()
        for kind in model.attention_kinds():
            self.resblocks.append(AttentionResblock(model, kind, text_length))
            self.resblocks.append(MlpResblock(d))
        self.norm = nn.LayerNorm(d)
        self.text_head = Head(d, text_vocab + 1)
        self.image_head = Head(d, image_vocab)
        if not self.text_embedding.is_meta:
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set all parameters to their ``initial_values``."""
        for (_, parameter), (_, value) in zip(self.named_parameters(), self.initial_values(seed), strict=True):
            parameter.copy_(value)

    @property
    def heads(self) -> list[nn.Module]:
        """The unembeddings of text and image."""
        return [self.text_head, self.image_head]

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and initial value (float32), which depends on (seed, name) alone.

        Biases are 0 and gains 1. Others are normal with std 0.02, or 0.02 / sqrt(resblocks) for resblocks' output
        matrices. ``initial`` may replace any of them.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                value = torch.zeros(parameter.shape)
            elif name.endswith("norm.weight"):
                value = torch.ones(parameter.shape)
            else:
                residual_output = name.startswith("resblocks.") and name.endswith("out.weight")
                std = INIT_STD / math.sqrt(len(self.resblocks)) if residual_output else INIT_STD
                value = normal_values(parameter.shape, std, seed, name)
            yield name, value if self._initial is None else self._initial(name, value)

    def cast_resblocks(self, dtype: torch.dtype) -> Prior:
        """Cast only the matrices of the resblocks to ``dtype``."""
        for parameter in self.decayed_parameters().values():
            parameter.data = parameter.data.to(dtype)
        return self

    def compute_resblocks_in(self, dtype: torch.dtype) -> Prior:
        """Have the resblocks compute in ``dtype`` while their matrices stay in their own type."""
        for module in self.resblocks.modules():
            if isinstance(module, Linear):
                module.computes_in = dtype
        return self

    def decayed_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that weight decay applies to, by name: the matrices of the resblocks.

        Biases, gains, embeddings and unembeddings are not decayed (paper, appendix B.2). In mixed precision the same
        matrices are in 16 bit, and PowerSGD compresses them.
        """
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("resblocks.") and parameter.dim() == 2
        }

    def with_padding(self, text: Tensor, length: Tensor) -> Tensor:
        """Replace the ids of captions (B, T) after their ``length`` (B,) by the padding tokens of their positions."""
        if text.shape[-1] != self.text_length:
            raise ValueError(f"text has {text.shape[-1]} positions, the prior {self.text_length}")
        position = torch.arange(self.text_length, device=text.device)
        return torch.where(position < length[:, None].long(), text.long(), self.text_vocab + position)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Embed ids with padding, (..., T) -> (..., T, d)."""
        return F.embedding(text_ids, self.text_embedding) + self.text_position

    def embed_image(self, image: Tensor) -> Tensor:
        """Embed image tokens in raster order, (B, S) -> (B, S, d)."""
        positions = (self.image_row[:, None] + self.image_column).flatten(0, 1)
        return F.embedding(image, self.image_embedding) + positions

    def forward(self, text_ids: Tensor, image: Tensor) -> Tensor:
        """Return the normed hidden states (B, T + S, d) of text ids (B, T) with padding and image tokens (B, S)."""
        x = torch.cat([self.embed_text(text_ids), self.embed_image(image)], dim=1)
        for block in self.resblocks:
            if self.model.checkpoint_resblocks and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (B, T - 1, V_text + 1) of text positions 1 to T - 1; the last class is padding."""
        return self.text_head(hidden[:, : self.text_length - 1])  # type: ignore[no-any-return]

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (B, S, V_image) of all image positions."""
        return self.image_head(hidden[:, self.text_length - 1 : -1])  # type: ignore[no-any-return]

    def text_counts(self, text_length: Tensor) -> Tensor:
        """Return the number of text positions that the loss counts, for captions of ``text_length`` (B,) tokens.

        These are a caption's tokens after the first, and the first padding of a caption shorter than T.
        """
        return text_length.long().clamp(max=self.text_length - 1)

    def loss(
        self,
        text: Tensor,
        text_length: Tensor,
        image: Tensor,
        text_count: Tensor | float | None = None,
        seen: Tensor | None = None,
    ) -> PriorLoss:
        """Return the mean cross-entropies of a batch.

        The text's mean is over ``text_counts`` positions: padding after the first is certain and would dilute it.
        The image's mean is over all S tokens.

        Args:
            text: (B, T) caption ids; those from ``text_length`` on are ignored.
            text_length: (B,) number of tokens of each caption. On the CPU, a GPU need not be waited for.
            image: (B, S) image tokens, int64.
            text_count: divisor of the text's sum; by default the number of counted positions. For a micro-batch, give
                the whole batch's number times the micro-batch's share of the rows: then the micro-batches' means,
                weighted by their shares, add up to the whole batch's.
            seen: (B, S) image tokens that later ones are predicted from; by default ``image``.
        """
        text_ids = self.with_padding(text, send(text_length, text.device))
        hidden = self(text_ids, image if seen is None else seen)
        position = torch.arange(1, self.text_length, device=text_length.device)
        counted = send((position <= text_length[:, None].long()).nonzero(), text.device).unbind(1)
        text_targets = text_ids[:, 1:].clamp(max=self.text_vocab)[counted]
        text_sum = self.text_head(hidden[:, : self.text_length - 1][counted], text_targets)
        image_sum = self.image_head(hidden[:, self.text_length - 1 : -1].flatten(0, 1), image.flatten())
        count = self.text_counts(text_length).sum().clamp(min=1) if text_count is None else text_count
        return PriorLoss(text_sum / count, image_sum / image.numel())

    def log_likelihood(self, text_ids: Tensor, image: Tensor) -> Tensor:
        """Return ln p(image | text) in nats, (B,) float64, of text ids (B, T) with padding and images (B, S)."""
        log_probabilities = self.image_logits(self(text_ids, image)).double().log_softmax(-1)
        return log_probabilities.gather(-1, image[..., None])[..., 0].sum(-1)


def normal_values(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    """Draw normal values on the CPU, which depend on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/prior/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


class LossModule(nn.Module):
    """A module whose forward pass is the prior's loss: ``fully_shard`` gathers parameters around forward passes."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(
        self,
        text: Tensor,
        length: Tensor | list[int],
        image: Tensor,
        text_count: Tensor | float,
        seen: Tensor | None = None,
    ) -> PriorLoss:
        """Return ``Prior.loss``; a list of lengths stays on the CPU, where ``fully_shard`` would move a tensor."""
        return self.prior.loss(text, torch.as_tensor(length), image, text_count, seen)


def build_prior(recipe: Recipe, initial: InitialValue | None = None) -> Prior:
    """Build the recipe's prior with its initial weights, or without storage under ``torch.device("meta")``."""
    return Prior(
        recipe.prior.model,
        text_length=recipe.tokenizer.text_length,
        text_vocab=recipe.tokenizer.vocab_size,
        image_vocab=recipe.dvae.model.codebook_size,
        seed=recipe.seed,
        initial=initial,
    )


def load_prior(checkpoint: Checkpoint) -> Prior:
    """Load the prior of a checkpoint for sampling, with its EMA weights."""
    with torch.device("meta"):
        model = build_prior(checkpoint.recipe())
    checkpoint.load_into(model, assign=True)
    return model.eval().requires_grad_(False)
