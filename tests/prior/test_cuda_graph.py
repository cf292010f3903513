"""The step that a CUDA graph captures, run without a graph: fixed shapes, fixed memory, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers.decoding import IMAGE_VOCAB, LAYOUTS, build, check_against_the_whole_stream, inputs, recomputed
from torch import Tensor

from dalle_cli.config.layout import KINDS, AttentionKind
from dalle_cli.prior.attention import raster_offsets
from dalle_cli.prior.cpu_kernels import Precision
from dalle_cli.prior.cuda_graph import StaticStep, fast_step, graph_step, slot_tables
from dalle_cli.prior.decode import Cache, Decoder, Slots


def zeroed(cache: Cache) -> Cache:
    """Zero the slots, as ``fork`` does on a GPU."""
    return Cache(cache.text, [image.zero_() for image in cache.image])


def static(decoder: Decoder, cache: Cache) -> StaticStep:
    return StaticStep(decoder, zeroed(cache))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("grid", "text", "kernel"), [(3, 1, 5), (5, 7, 3), (8, 16, 11), (12, 16, 5)])
@pytest.mark.parametrize(("captions", "n"), [(2, 3), (1, 1)])
def test_logits_are_those_of_the_whole_stream(
    layout: str, grid: int, text: int, kernel: int, captions: int, n: int
) -> None:
    check_against_the_whole_stream(build(layout, grid, text, kernel), captions, n, static)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_continues_after_given_tokens(precision: Precision) -> None:
    prior = build("row column conv full row conv", 5, 4, 3)
    text_ids, images = inputs(prior, captions=2, n=2, given=12)
    decoder = Decoder(prior, precision)
    prefix = decoder.prefill(text_ids, images[:, 0, :12])
    cache = prefix.fork(2)
    step, plain = StaticStep(decoder, prefix.fork(2)), decoder.step
    for image in step.cache.image:
        image.nan_to_num_(0, 0, 0)
    for p in range(12, 24):
        gap = (step(p, images[..., p]) - plain(cache, p, images[..., p])).abs().max()
        assert gap < (1e-5 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(6, 3), (4, 11), (1, 1)])
def test_tables_read_what_the_pattern_allows(kind: AttentionKind, grid: int, kernel: int) -> None:
    write, read, bias = slot_tables(Slots(kind, grid, kernel), torch.float32)
    offsets = raster_offsets(kind, grid, kernel)
    assert read.shape == bias.shape == (grid**2, grid if kind == "column" else Slots(kind, grid, kernel).count)
    position_in: dict[int, int] = {}
    for position in range(grid**2):
        position_in[int(write[position])] = position
        seen = [
            position_in[int(slot)] for slot, hidden in zip(read[position], bias[position], strict=True) if hidden == 0
        ]
        assert sorted(seen) == sorted(position - d for d in offsets if d <= position)


def test_shapes_and_memory_are_fixed() -> None:
    """A graph needs the same shapes at every position, and caches that stay where they are in memory."""
    prior = build("row column conv full row conv", 4, 3, 3)
    text_ids, images = inputs(prior, captions=1, n=2)
    decoder = Decoder(prior)
    step = static(decoder, decoder.prefill(text_ids).fork(2))
    places = [image.data_ptr() for image in step.cache.image] + [step.position.data_ptr(), step.token.data_ptr()]
    seen = set()
    for position in range(15):
        with torch.profiler.profile(record_shapes=True) as recorded:
            step(position, images[..., position])
        seen.add(tuple((event.name, str(event.input_shapes)) for event in recorded.events()))
    assert len(seen) == 1
    assert places == [x.data_ptr() for x in [*step.cache.image, step.position, step.token]]


def test_a_cpu_uses_the_plain_step() -> None:
    prior = build("row ...", 3, 4, 3)
    decoder = Decoder(prior)
    cache = decoder.prefill(inputs(prior, 1, 2)[0]).fork(2)
    step = fast_step(decoder, cache)
    assert isinstance(step, partial)
    assert step.func == decoder.step


@pytest.mark.parametrize("fault", ["no capture", "wrong logits", None])
def test_the_plain_step_is_used_if_no_graph_can_be_captured(
    fault: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = build("row column ...", 3, 4, 3)
    text_ids, images = inputs(prior, captions=1, n=2)
    decoder = Decoder(prior)
    cache = zeroed(decoder.prefill(text_ids).fork(2))
    calls = []

    def capture(static: StaticStep, position: int, token: Tensor) -> Callable[[int, Tensor], Tensor]:
        if fault == "no capture":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay(position: int, token: Tensor) -> Tensor:
            calls.append(position)
            return static(position, token) + (fault == "wrong logits")

        return replay

    monkeypatch.setattr(StaticStep, "capture", capture)
    step = graph_step(decoder, cache)
    found = torch.stack([step(p, images[..., p]) for p in range(8)], dim=2)
    assert found.shape[-1] == IMAGE_VOCAB
    assert (found - recomputed(prior, text_ids, images)[:, :, 1:]).abs().max() < 1e-4
    assert calls == {"no capture": [], "wrong logits": [0], None: list(range(8))}[fault]
    assert ("no CUDA graph of the decoding step" in capsys.readouterr().err) == (fault is not None)
