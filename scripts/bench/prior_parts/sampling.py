"""Measure sampling with our caches against the cached step and ``generate_images`` of dalle-pytorch.

A step draws one token of each image and runs the model on it. Steps are timed at several rows of the image, and the
time of an image is the sum over all its positions, interpolated linearly between those rows. This is accurate because
the time of a step is constant within a row (but for the first row) and grows linearly from row to row. Our time also
includes the prefill of the captions; dalle-pytorch's does not. As a check, one batch of whole images is drawn as
``dalle sample`` draws them, and its speed is given too.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.prior.cpu_kernels import Precision
from dalle_cli.prior.decode import Decoder
from dalle_cli.sampling.draw import draw_tokens, filter_logits, sample_images
from prior_parts.model import ModelSizes, build_prior
from prior_parts.peer import build_peer

Step = Callable[[], object]
Log = Callable[[str], None]
CACHED, AS_CALLED = "dalle-pytorch, cached step", "dalle-pytorch, generate_images as called"
GOAL_BATCH = 8
"""Batch size that the goals hold for."""
GOALS = {("fp32", CACHED): 5.0, ("bf16", CACHED): 8.0, ("fp32", AS_CALLED): 100.0, ("bf16", AS_CALLED): 100.0}
MAX_UNCACHED_BATCH = 8
"""Largest batch whose images are drawn without a cache; more do not fit the memory of an ordinary machine."""
PEER_STEPS = {CACHED: 4, AS_CALLED: 1}
"""Steps of dalle-pytorch that are timed together."""


@dataclass(frozen=True)
class Sizes(ModelSizes):
    """Sizes of the model, batch sizes, the number of timed rounds (after one of warm-up) and of timed image rows."""

    layers: int = 12
    batches: tuple[int, ...] = (1, 8, 64)
    rounds: int = 3
    rows: int = 4

    @property
    def image_length(self) -> int:
        return self.grid**2

    @property
    def positions(self) -> tuple[int, ...]:
        """Image positions that timed steps start at: the starts of rows, from the first row to the last."""
        return tuple(round(i * (self.grid - 1) / (self.rows - 1)) * self.grid for i in range(self.rows))


@dataclass
class Contender:
    """A way to sample that is timed."""

    name: str
    steps_per_timing: int
    """Number of consecutive steps that are timed together."""
    start_at: Callable[[int], Step]
    """Returns a function that runs one step per call, from the given image position on."""
    prefill: Callable[[], object] | None = None
    """Work before an image's first step, if its time is counted."""
    draw_images: Callable[[], object] | None = None
    """Draws a batch of whole images."""
    step_seconds: dict[int, float] = field(default_factory=dict)
    """Median seconds of a step, by the position that it was timed at."""


def measure(sizes: Sizes, peer: Any | None, log: Log) -> dict[str, Any]:
    """Return the rows of the table. ``peer`` is the module ``dalle_pytorch``, or None to leave it out."""
    rows: list[dict[str, Any]] = []
    priors: dict[Precision, Decoder] = {
        precision: Decoder(build_prior(sizes).eval().requires_grad_(False), precision)
        for precision in get_args(Precision)
    }
    peers = (
        {} if peer is None else {name: build_sampling_peer(sizes, peer, name == CACHED) for name in (CACHED, AS_CALLED)}
    )
    for batch in sizes.batches:
        contenders = [
            _ours(decoder, precision, batch, captions)
            for precision, decoder in priors.items()
            for captions in sorted({1, batch} if batch <= GOAL_BATCH else {1})
        ]
        for name, model in peers.items():
            if name == CACHED or batch <= MAX_UNCACHED_BATCH:
                contenders.append(_peer(sizes, peer, model, batch, name))
        _time_steps(sizes, contenders)
        for contender in contenders:
            rows.append(_row(sizes, contender, batch))
            log(describe(rows[-1]))
    return {"sizes": asdict(sizes), "rows": rows, "ratios": speed_ratios(rows)}


def describe(row: dict[str, Any]) -> str:
    """Return a row of results as a line of text."""
    return (
        f"sampling  batch {row['batch']:>2}  {row['name']:<42} {row['tokens_per_second']:>9.1f} tokens/s "
        f"{row['images_per_second']:>9.4f} images/s"
    )


def _time_steps(sizes: Sizes, contenders: list[Contender]) -> None:
    """Fill ``step_seconds`` of all contenders, which are timed in alternation at each position."""
    for position in sizes.positions:
        steps = [contender.start_at(position) for contender in contenders]
        seconds_of: list[list[float]] = [[] for _ in contenders]
        for _ in range(sizes.rounds + 1):
            for contender, step, seconds in zip(contenders, steps, seconds_of, strict=True):
                seconds.append(_seconds(step, contender.steps_per_timing) / contender.steps_per_timing)
        for contender, seconds in zip(contenders, seconds_of, strict=True):
            contender.step_seconds[position] = statistics.median(seconds[1:])
        del steps, step
        gc.collect()


def _row(sizes: Sizes, contender: Contender, batch: int) -> dict[str, Any]:
    step = mean_over_image(contender.step_seconds, sizes.image_length)
    seconds = step * sizes.image_length
    row: dict[str, Any] = {"batch": batch, "name": contender.name}
    if contender.prefill is not None:
        prefill = statistics.median([_seconds(contender.prefill, 1) for _ in range(sizes.rounds + 1)][1:])
        seconds += prefill
        row["prefill_ms"] = prefill * 1e3
    row |= {
        "step_ms": step * 1e3,
        "tokens_per_second": batch * sizes.image_length / seconds,
        "images_per_second": batch / seconds,
        "timed": f"{sizes.rounds} x {contender.steps_per_timing} steps at positions "
        + ", ".join(map(str, contender.step_seconds)),
        "step_seconds": contender.step_seconds,
    }
    if contender.draw_images is not None:
        row["whole_images_tokens_per_second"] = batch * sizes.image_length / _seconds(contender.draw_images, 1)
    return row


def _seconds(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - began


def _ours(decoder: Decoder, precision: Precision, batch: int, captions: int) -> Contender:
    text_ids, n = distinct_captions(decoder, captions), batch // captions
    uniforms = torch.rand(captions, n, decoder.image_length, dtype=torch.float64)
    settings = SamplingSettings(batch_size=batch)
    return Contender(
        f"dalle {precision}, {captions} caption{'s' if captions > 1 else ''}",
        max(1, decoder.grid - 1),
        lambda position: our_step(decoder, text_ids, position, uniforms),
        lambda: decoder.prefill(text_ids).fork(n),
        lambda: sample_images(decoder, text_ids, uniforms, settings),
    )


def distinct_captions(decoder: Decoder, captions: int) -> Tensor:
    """Return token ids of captions that differ (C, T)."""
    return torch.arange(captions * decoder.text_length).view(captions, -1) % 100


def our_step(decoder: Decoder, text_ids: Tensor, start: int, uniforms: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs one step of ``sample_images`` per call and returns the tokens it drew (C, n).

    The steps run along the row that begins at image position ``start``, over and over; all tokens before it are 0. From
    the second pass on, the caches hold later positions in place of earlier ones, which does not change the time.
    """
    captions, n, length = uniforms.shape
    prefix = decoder.prefill(text_ids, text_ids.new_zeros(captions, start))
    cache, first = prefix.fork(n), prefix.logits[:, None].expand(-1, n, -1)
    # Leave out the last position of a row, since the model does not run on the image's last token.
    end = min(start + max(1, decoder.grid - 1), length - 1)
    position, logits, likelihood = start, first, torch.zeros(captions, n, dtype=torch.float64)

    @torch.inference_mode()
    def step() -> Tensor:
        nonlocal position, logits, likelihood
        filtered = filter_logits(logits, temperature=1, top_k=None, top_p=1)
        token = draw_tokens(filtered, uniforms[..., position])
        likelihood = likelihood + logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        logits = decoder.step(cache, position, token)
        position += 1
        if position == end:
            position, logits = start, first
        return token

    return step


def build_sampling_peer(sizes: Sizes, peer: Any, cached: bool) -> Any:
    """Return dalle-pytorch's model with row and column attention.

    Its sparse attention has no cache; ``optimize_for_inference`` replaces it by dense attention with a mask, which has
    one. Its convolutional attention has no cache in either case, so it is left out.
    """
    kinds = ("axial_row", "axial_col", "axial_row", "axial_row")
    model = build_peer(sizes, peer, attn_types=kinds, optimize_for_inference=cached)
    return model.eval().requires_grad_(False)


def _peer(sizes: Sizes, peer: Any, model: Any, batch: int, name: str) -> Contender:
    steps = PEER_STEPS[name]
    last = sizes.image_length - steps * (sizes.rounds + 1) - 1

    def start_at(position: int) -> Step:
        return peer_step(sizes, peer, model, batch, min(position, last), cached=name == CACHED)

    return Contender(name, steps, start_at)


def peer_step(sizes: Sizes, peer: Any, model: Any, batch: int, start: int, cached: bool) -> Callable[[], Tensor]:
    """Return a function that runs one step of the loop in ``generate_images`` per call, from position ``start`` on."""
    top_k, gumbel_sample = peer.dalle_pytorch.top_k, peer.dalle_pytorch.gumbel_sample
    text = torch.arange(1, sizes.text_length + 1)[None] % 100 + 1
    image = torch.zeros(1, start, dtype=torch.int64)
    cache: dict[str, Any] | None = None
    if cached:
        # Fill the cache with one image and repeat it, because a full pass over a large batch needs too much memory.
        cache = {}
        with torch.no_grad():
            model(text, image, cache=cache)
        cache = repeat_cache(cache, batch)
        image = torch.cat([image, image.new_zeros(1, 1)], dim=1)
    text, image = text.expand(batch, -1).clone(), image.expand(batch, -1).clone()

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal image
        # ``forward_with_cond_scale`` drops the cache at scale 1, so the cached step calls the model itself.
        logits = model(text, image, cache=cache) if cached else model.forward_with_cond_scale(text, image)
        drawn = gumbel_sample(top_k(logits[:, -1, :], thres=0.5), temperature=1.0, dim=-1) - model.num_text_tokens
        image = torch.cat([image, drawn[:, None]], dim=-1)
        return image

    return step


def repeat_cache(value: Any, batch: int) -> Any:
    """Return the cache of one image, repeated for ``batch`` images."""
    if isinstance(value, Tensor):
        return value.repeat(batch, *[1] * (value.dim() - 1))
    if isinstance(value, dict):
        return {key: repeat_cache(entry, batch) for key, entry in value.items()}
    if isinstance(value, tuple | list | deque):
        return type(value)(repeat_cache(entry, batch) for entry in value)
    return value


def mean_over_image(step_seconds: dict[int, float], image_length: int) -> float:
    """Return the mean seconds of a step, interpolated linearly between timed positions and constant outside them."""
    at, seconds = list(step_seconds), list(step_seconds.values())
    total = at[0] * seconds[0] + (image_length - at[-1]) * seconds[-1]
    for i in range(1, len(at)):
        total += (at[i] - at[i - 1]) * (seconds[i] + seconds[i - 1]) / 2
    return total / image_length


def speed_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratios of our tokens per second to dalle-pytorch's, for all pairs of one batch size."""
    ratios = []
    for ours in (row for row in rows if row["name"].startswith("dalle ")):
        for theirs in (row for row in rows if row["name"].startswith("dalle-pytorch")):
            if ours["batch"] != theirs["batch"]:
                continue
            ratio = {"batch": ours["batch"], "ours": ours["name"], "peer": theirs["name"]}
            ratio["ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
            goal = GOALS.get((ours["name"].split()[1].rstrip(","), theirs["name"]))
            if ours["batch"] == GOAL_BATCH and goal is not None:
                ratio["goal"] = goal
            ratios.append(ratio)
    return ratios
