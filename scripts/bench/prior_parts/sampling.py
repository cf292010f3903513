"""Sampling: tokens and images a second with our caches, against the peer's cached step and its ``generate_images``.

Turns are timed at rows spread over the image, the contenders one after another in each round, and an image is counted
as one turn for each of its tokens, linear between the rows. That is how the time goes: a step costs the same all along
a row, but for the image's first, and grows by as much from each to the next where it grows. A turn is a step and the
draw behind it; ours have the reading of the captions counted on top, the peer's have not. So that nobody has to
believe this, one batch of whole images as ``dalle sample`` draws them stands beside.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.prior.cpu_kernels import Precision
from dalle_cli.prior.decode import Decoder
from dalle_cli.sampling.draw import draw_tokens, filter_logits, sample_images
from prior_parts.model import ModelSizes, build_prior

Turn = Callable[[], object]
Log = Callable[[str], None]
CACHED, AS_CALLED = "dalle-pytorch, cached step", "dalle-pytorch, generate_images as called"
GOAL_BATCH = 8
GOALS = {("fp32", CACHED): 5.0, ("bf16", CACHED): 8.0, ("fp32", AS_CALLED): 100.0, ("bf16", AS_CALLED): 100.0}
ANEW_BATCH = 8
"""More streams than this, computed anew, do not fit an ordinary machine's memory."""
PEER_TURNS = {CACHED: 4, AS_CALLED: 1}


@dataclass(frozen=True)
class Sizes(ModelSizes):
    """The model, the same for both sides, and what is timed: ``rounds`` beside one that warms up."""

    layers: int = 12
    batches: tuple[int, ...] = (1, 8, 64)
    rounds: int = 3
    rows: int = 4

    @property
    def image_length(self) -> int:
        return self.grid**2

    @property
    def places(self) -> tuple[int, ...]:
        """Image positions from which turns are timed: the beginnings of rows, the first and the last among them."""
        return tuple(round(i * (self.grid - 1) / (self.rows - 1)) * self.grid for i in range(self.rows))


@dataclass
class Contender:
    """A timed way to sample: ``begin`` readies a turn at an image position; ``turns`` calls are measured at once."""

    name: str
    turns: int
    begin: Callable[[int], Turn]
    read: Callable[[], object] | None = None
    """Work before an image's first turn, where it is counted."""
    whole: Callable[[], object] | None = None
    """Draws a batch of whole images."""
    steps: dict[int, float] = field(default_factory=dict)


def measure(sizes: Sizes, peer: Any | None, log: Log) -> dict[str, Any]:
    """Rows of the table. ``peer`` is the module ``dalle_pytorch``, or None to leave it out."""
    rows: list[dict[str, Any]] = []
    priors: dict[Precision, Decoder] = {
        precision: Decoder(build_prior(sizes).eval().requires_grad_(False), precision) for precision in ("fp32", "bf16")
    }
    peers = {} if peer is None else {name: build_peer(sizes, peer, name == CACHED) for name in (CACHED, AS_CALLED)}
    for batch in sizes.batches:
        contenders = [
            _ours(decoder, precision, batch, captions)
            for precision, decoder in priors.items()
            for captions in sorted({1, batch} if batch <= GOAL_BATCH else {1})
        ]
        for name, model in peers.items():
            if name == CACHED or batch <= ANEW_BATCH:
                contenders.append(_peer(sizes, peer, model, batch, name))
        _race(sizes, contenders)
        for contender in contenders:
            rows.append(_row(sizes, contender, batch))
            log(describe(rows[-1]))
    return {"sizes": asdict(sizes), "rows": rows, "ratios": _ratios(rows)}


def describe(row: dict[str, Any]) -> str:
    """Return a row of results as a line of text."""
    return (
        f"sampling  batch {row['batch']:>2}  {row['name']:<42} {row['tokens_per_second']:>9.1f} tokens/s "
        f"{row['images_per_second']:>9.4f} images/s"
    )


def _race(sizes: Sizes, contenders: list[Contender]) -> None:
    """Fill each one's ``steps`` with the median seconds of a turn at each place, all timed by turns."""
    for place in sizes.places:
        turns = [contender.begin(place) for contender in contenders]
        taken: list[list[float]] = [[] for _ in contenders]
        for _ in range(sizes.rounds + 1):
            for contender, turn, seconds in zip(contenders, turns, taken, strict=True):
                seconds.append(_seconds(turn, contender.turns) / contender.turns)
        for contender, seconds in zip(contenders, taken, strict=True):
            contender.steps[place] = statistics.median(seconds[1:])
        del turns, turn
        gc.collect()


def _row(sizes: Sizes, contender: Contender, batch: int) -> dict[str, Any]:
    step = mean_over_image(contender.steps, sizes.image_length)
    seconds = step * sizes.image_length
    row: dict[str, Any] = {"batch": batch, "name": contender.name}
    if contender.read is not None:
        read = statistics.median([_seconds(contender.read, 1) for _ in range(sizes.rounds + 1)][1:])
        seconds += read
        row["read_ms"] = read * 1e3
    row |= {
        "step_ms": step * 1e3,
        "tokens_per_second": batch * sizes.image_length / seconds,
        "images_per_second": batch / seconds,
        "counted_from": f"{sizes.rounds} x {contender.turns} turns at positions {', '.join(map(str, contender.steps))}",
        "seconds_of_a_turn": contender.steps,
    }
    if contender.whole is not None:
        row["whole_images_tokens_per_second"] = batch * sizes.image_length / _seconds(contender.whole, 1)
    return row


def _seconds(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - began


def _ours(decoder: Decoder, precision: Precision, batch: int, captions: int) -> Contender:
    text_ids, n = texts(decoder, captions), batch // captions
    uniforms = torch.rand(captions, n, decoder.image_length, dtype=torch.float64)
    settings = SamplingSettings(batch_size=batch)
    return Contender(
        f"dalle {precision}, {captions} caption{'s' if captions > 1 else ''}",
        max(1, decoder.grid - 1),
        lambda place: our_turn(decoder, text_ids, place, uniforms),
        lambda: decoder.prefill(text_ids).fork(n),
        lambda: sample_images(decoder, text_ids, uniforms, settings),
    )


def texts(decoder: Decoder, captions: int) -> Tensor:
    """Captions (C, T) that differ."""
    return torch.arange(captions * decoder.text_length).view(captions, -1) % 100


def our_turn(decoder: Decoder, text_ids: Tensor, place: int, uniforms: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs one step of ``sample_images`` at each call and gives the (C, n) tokens it drew.

    The steps run along the row of image tokens that begins at ``place``, again and again. Tokens before the row are
    all 0. From the second pass on the caches hold later positions in place of earlier ones, which takes as long.
    """
    captions, n, length = uniforms.shape
    prefix = decoder.prefill(text_ids, text_ids.new_zeros(captions, place))
    cache, first = prefix.fork(n), prefix.logits[:, None].expand(-1, n, -1)
    # The last position of a row is left out: behind the image's last token there is no step.
    end = min(place + max(1, decoder.grid - 1), length - 1)
    position, logits, likelihood = place, first, torch.zeros(captions, n, dtype=torch.float64)

    @torch.inference_mode()
    def turn() -> Tensor:
        nonlocal position, logits, likelihood
        filtered = filter_logits(logits, temperature=1, top_k=None, top_p=1)
        token = draw_tokens(filtered, uniforms[..., position])
        likelihood = likelihood + logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        logits = decoder.step(cache, position, token)
        position += 1
        if position == end:
            position, logits = place, first
        return token

    return turn


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


def _peer(sizes: Sizes, peer: Any, model: Any, batch: int, name: str) -> Contender:
    turns = PEER_TURNS[name]
    last = sizes.image_length - turns * (sizes.rounds + 1) - 1
    return Contender(
        name, turns, lambda place: peer_turn(sizes, peer, model, batch, min(place, last), cached=name == CACHED)
    )


def peer_turn(sizes: Sizes, peer: Any, model: Any, batch: int, place: int, cached: bool) -> Callable[[], Tensor]:
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
    ratios = []
    for ours in (row for row in rows if row["name"].startswith("dalle ")):
        for theirs in (row for row in rows if row["name"].startswith("dalle-pytorch")):
            if ours["batch"] != theirs["batch"]:
                continue
            ratio = {"batch": ours["batch"], "ours": ours["name"], "peer": theirs["name"]}
            ratio["ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
            if ours["batch"] == GOAL_BATCH:
                ratio["goal"] = GOALS[ours["name"].split()[1].rstrip(","), theirs["name"]]
            ratios.append(ratio)
    return ratios
