"""The prior on a GPU: attention by ``flex_attention``, and resblocks through ``torch.compile``.

Neither can be taken for granted on every card and version, so each is tried first, on one stream through a block of the
prior's sizes, and used for the blocks of that kind only if output and gradients are those of the plain block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dalle_cli.config.schema import Compile
from dalle_cli.prior.attention import is_dense
from dalle_cli.prior.flex_attention import FlexAttention
from dalle_cli.prior.model import AttentionResblock, Linear, MlpResblock, Prior, Resblock
from dalle_cli.training.trial import agrees, prepare_compiler


def speed_up(
    prior: Prior, compiles: Compile, device: torch.device, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Have the resblocks of ``prior`` compute by the fastest ways that prove right on ``device``.

    The prior may be whole, sharded or without storage: the trials use blocks of their own.
    """
    prepare_compiler()
    grouped: dict[str, list[Resblock]] = {}
    for block in cast(list[Resblock], list(prior.resblocks)):
        grouped.setdefault(block.kind if isinstance(block, AttentionResblock) else "MLP", []).append(block)
    for kind, blocks in grouped.items():
        trial, x = _trial_block(prior, blocks[0], device)
        name = f"train-prior: {kind} resblocks"
        if isinstance(trial, AttentionResblock) and not is_dense(trial.kind, trial.grid):
            plain, fast = _before_and_after(trial, x)
            trial.flex = FlexAttention(trial.kind, trial.text_length, trial.grid, trial.conv_kernel, device)
            if agrees(f"{name} by flex_attention", plain, fast):
                for block in blocks:
                    cast(AttentionResblock, block).flex = trial.flex
            else:
                trial.flex = None
        if compiles == "auto":
            plain, fast = _before_and_after(trial, x)
            trial.compiled_branch = torch.compile(trial.branch, dynamic=False, backend=backend)
            if agrees(f"{name} by torch.compile", plain, fast):
                for block in blocks:
                    block.compiled_branch = torch.compile(block.branch, dynamic=False, backend=backend)


def _trial_block(prior: Prior, like: Resblock, device: torch.device) -> tuple[Resblock, Tensor]:
    """Return a block of the sizes and types of ``like``, with random weights, and a stream (1, T + S, d) for it."""
    model = prior.model
    block: Resblock = (
        AttentionResblock(model, like.kind, prior.text_length)
        if isinstance(like, AttentionResblock)
        else MlpResblock(model.d_model)
    )
    block.to(device)
    generator = torch.Generator(device).manual_seed(0)
    for ours, theirs in zip(block.modules(), like.modules(), strict=True):
        if isinstance(ours, Linear) and isinstance(theirs, Linear):
            nn.init.normal_(ours.weight, std=ours.weight.shape[1] ** -0.5, generator=generator)
            nn.init.zeros_(ours.bias)
            ours.weight.data = ours.weight.data.to(theirs.weight.dtype)
            ours.computes_in = theirs.computes_in
    length = prior.text_length + prior.image_length
    return block, torch.randn(1, length, model.d_model, device=device, generator=generator)


def _before_and_after(trial: Resblock, x: Tensor) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """Return ``_output_and_gradients`` of the block as it is now, and as it will be when the function is called."""
    return _output_and_gradients(copy.copy(trial), x), _output_and_gradients(trial, x)


def _output_and_gradients(block: Resblock, x: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that computes the block's output, and the gradients in ``x`` and the parameters."""

    def work() -> list[Tensor]:
        stream = x.detach().requires_grad_()
        with torch.enable_grad():
            out = block(stream)
            gradient = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1))
            return [out, *torch.autograd.grad(out, [stream, *block.parameters()], gradient)]

    return work
