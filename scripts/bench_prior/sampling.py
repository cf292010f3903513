"""Sampling: tokens and images a second with our caches, against the peer's cached step and its ``generate_images``.

Ours are whole images, as ``dalle sample`` draws them: reading the caption, each step, each draw. The peer's would take
too long: steps are timed at places spread over the image, and an image is counted as one step for each of its tokens,
linear between the places. A step of the peer is what its ``generate_images`` does in one turn, the draw included.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench_prior.model import ModelSizes, build_prior
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.packed import Precision
from dalle_cli.recipes.schema import SamplingSettings
from dalle_cli.sampling.draw import sample_images

Turn = Callable[[], Tensor]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Sizes(ModelSizes):
    """The model, the same for both sides, and what is timed."""

    layers: int = 12
    batches: tuple[int, ...] = (1, 8, 64)
    repeats: int = 3

    @property
    def image_length(self) -> int:
        return self.grid**2

    @property
    def places(self) -> tuple[int, ...]:
        """Image positions at which the peer is timed."""
        return tuple(round(share * (self.image_length - self.repeats - 2)) for share in (0.01, 0.33, 0.67, 1.0))


def measure(sizes: Sizes, peer: Any | None, log: Log) -> dict[str, Any]:
    """Rows of the table. ``peer`` is the module ``dalle_pytorch``, or None to leave it out."""
    rows: list[dict[str, Any]] = []
    for batch in sizes.batches:
        for precision in ("fp32", "bf16"):
            for captions in sorted({1, batch} if batch <= 8 else {1}):
                rows.append(_ours(sizes, precision, batch, captions))
                log(describe(rows[-1]))
        if peer is not None:
            rows.append(_peer(sizes, peer, batch, cached=True))
            log(describe(rows[-1]))
            # 64 streams computed anew do not fit an ordinary machine's memory.
            if batch <= 8:
                rows.append(_peer(sizes, peer, batch, cached=False))
                log(describe(rows[-1]))
    return {"sizes": asdict(sizes), "rows": rows, "ratios": _ratios(rows)}


def describe(row: dict[str, Any]) -> str:
    return (
        f"sampling  batch {row['batch']:>2}  {row['name']:<42} {row['tokens_per_second']:>9.1f} tokens/s "
        f"{row['images_per_second']:>9.4f} images/s"
    )


def draw_ours(decoder: Decoder, batch: int, captions: int) -> float:
    """Seconds that ``batch`` images take, of ``captions`` captions."""
    text_ids = torch.arange(captions * decoder.text_length).view(captions, -1) % 100
    uniforms = torch.rand(captions, batch // captions, decoder.image_length, dtype=torch.float64)
    began = time.perf_counter()
    sample_images(decoder, text_ids, batch // captions, uniforms, SamplingSettings(batch_size=batch))
    return time.perf_counter() - began


def _ours(sizes: Sizes, precision: Precision, batch: int, captions: int) -> dict[str, Any]:
    decoder = Decoder(build_prior(sizes).eval().requires_grad_(False), precision)
    # The first image is the warm-up; 64 at once are many steps already.
    taken = [draw_ours(decoder, batch, captions) for _ in range(sizes.repeats + 1 if batch <= 8 else 2)][1:]
    seconds = statistics.median(taken)
    return {
        "name": f"dalle {precision}, " + ("1 caption" if captions == 1 else f"{captions} captions"),
        "batch": batch,
        "tokens_per_second": batch * sizes.image_length / seconds,
        "images_per_second": batch / seconds,
        "seconds": taken,
    }


def build_peer(sizes: Sizes, peer: Any, cached: bool) -> Any:
    """The peer at our sizes with its row and column attention.

    Its sparse attentions keep no cache; with ``optimize_for_inference`` it has masked dense ones that do. Its
    convolution keeps none in either, so it stays out.
    """
    vae = peer.DiscreteVAE(
        image_size=8 * sizes.grid, num_layers=3, num_tokens=sizes.image_vocab, codebook_dim=8, hidden_dim=8
    )
    model = peer.DALLE(
        dim=sizes.heads * sizes.d_head,
        vae=vae,
        num_text_tokens=sizes.text_vocab,
        text_seq_len=sizes.text_length,
        depth=sizes.layers,
        heads=sizes.heads,
        dim_head=sizes.d_head,
        attn_types=("axial_row", "axial_col", "axial_row", "axial_row"),
        optimize_for_inference=cached,
    )
    return model.eval().requires_grad_(False)


def _peer(sizes: Sizes, peer: Any, batch: int, cached: bool) -> dict[str, Any]:
    model = build_peer(sizes, peer, cached)
    steps: dict[int, float] = {}
    for place in sizes.places:
        turn = peer_turn(sizes, peer, model, batch, place, cached)
        taken = []
        for _ in range(sizes.repeats + 1):
            began = time.perf_counter()
            turn()
            taken.append(time.perf_counter() - began)
        steps[place] = statistics.median(taken[1:])
        del turn
        gc.collect()
    step = mean_over_image(steps, sizes.image_length)
    return {
        "name": "dalle-pytorch, " + ("cached step" if cached else "generate_images as called"),
        "batch": batch,
        "tokens_per_second": batch / step,
        "images_per_second": batch / (step * sizes.image_length),
        "step_seconds": steps,
        "extrapolated": f"from steps at image positions {', '.join(map(str, steps))}",
    }


def peer_turn(sizes: Sizes, peer: Any, model: Any, batch: int, place: int, cached: bool) -> Turn:
    """One turn of the loop in the peer's ``generate_images``, from image position ``place`` on, at each call."""
    top_k, gumbel_sample = peer.dalle_pytorch.top_k, peer.dalle_pytorch.gumbel_sample
    text = torch.arange(1, sizes.text_length + 1)[None] % 100 + 1
    image = torch.zeros(1, place, dtype=torch.int64)
    cache: dict[str, Any] | None = None
    if cached:
        # One stream fills the cache, which is then widened: its whole-stream pass of a large batch needs much memory.
        cache = {}
        with torch.no_grad():
            model(text, image, cache=cache)
        cache = _widened(cache, batch)
        image = torch.cat([image, image.new_zeros(1, 1)], dim=1)
    text, image = text.expand(batch, -1).clone(), image.expand(batch, -1).clone()

    @torch.no_grad()
    def turn() -> Tensor:
        nonlocal image
        # ``forward_with_cond_scale`` at scale 1 drops the cache; the cached step is what it would be with it.
        logits = model(text, image, cache=cache) if cached else model.forward_with_cond_scale(text, image)
        drawn = gumbel_sample(top_k(logits[:, -1, :], thres=0.5), temperature=1.0, dim=-1) - model.num_text_tokens
        image = torch.cat([image, drawn[:, None]], dim=-1)
        return image

    return turn


def _widened(value: Any, batch: int) -> Any:
    """A cache of one stream, repeated for ``batch``."""
    if isinstance(value, Tensor):
        return value.repeat(batch, *[1] * (value.dim() - 1))
    if isinstance(value, dict):
        return {key: _widened(entry, batch) for key, entry in value.items()}
    if isinstance(value, tuple | list | deque):
        return type(value)(_widened(entry, batch) for entry in value)
    return value


def mean_over_image(steps: dict[int, float], image_length: int) -> float:
    """Mean seconds of a step: linear between the places that were timed, constant before the first, behind the last."""
    at, seconds = list(steps), list(steps.values())
    total = at[0] * seconds[0] + (image_length - at[-1]) * seconds[-1]
    for i in range(1, len(at)):
        total += (at[i] - at[i - 1]) * (seconds[i] + seconds[i - 1]) / 2
    return total / image_length


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of ours over each of the peer's of the same batch, in tokens a second."""
    return [
        {
            "batch": ours["batch"],
            "ours": ours["name"],
            "peer": theirs["name"],
            "ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
        }
        for ours in rows
        for theirs in rows
        if ours["name"].startswith("dalle ") and theirs["name"].startswith("dalle-pytorch")
        if ours["batch"] == theirs["batch"]
    ]
