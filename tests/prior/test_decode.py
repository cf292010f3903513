"""Cached decoding against a recomputation of the whole stream."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from helpers.decoding import (
    LAYOUTS,
    build,
    check_against_the_whole_stream,
    decoded,
    inputs,
    recomputed,
)
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.config.layout import KINDS, AttentionKind
from dalle_cli.prior import cpu_kernels, decode
from dalle_cli.prior.attention import raster_offsets
from dalle_cli.prior.cpu_kernels import PackedLinear, Precision
from dalle_cli.prior.decode import Decoder, Slots
from dalle_cli.prior.model import Linear

SIZES = [(3, 1, 5), (5, 7, 3), (3, 7, 11), (5, 1, 1), (1, 2, 3), (8, 16, 11), (12, 16, 5)]


@pytest.fixture(params=[False, True], ids=["bmm", "embedding_bag"])
def _small_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute small products by embedding_bag too, like large ones."""
    if request.param:
        monkeypatch.setattr(cpu_kernels, "MIN_VALUES", {torch.float32: 0, torch.bfloat16: 0})


@pytest.mark.usefixtures("_small_products")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("grid", "text", "kernel"), SIZES)
@pytest.mark.parametrize(("captions", "n"), [(2, 3), (1, 1)])
def test_logits_are_those_of_the_whole_stream(
    layout: str, grid: int, text: int, kernel: int, captions: int, n: int
) -> None:
    check_against_the_whole_stream(build(layout, grid, text, kernel), captions, n)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("grid", "kernel", "given"), [(5, 3, 1), (5, 3, 12), (5, 11, 24), (8, 5, 17), (8, 5, 48), (2, 3, 3)]
)
def test_given_tokens_are_read_in_one_pass(layout: str, grid: int, kernel: int, given: int) -> None:
    prior = build(layout, grid, 3, kernel)
    text_ids, images = inputs(prior, 2, 4, given)
    decoder = Decoder(prior)
    found = decoded(decoder, decoder.prefill(text_ids, images[:, 0, :given]), images)
    assert found.shape[2] == prior.image_length - given
    assert (found - recomputed(prior, text_ids, images)[:, :, given:]).abs().max() < 1e-4


def test_captions_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = build("paper", 3, 4, 3)
    text_ids, images = inputs(prior, captions=5, n=1, given=2)
    decoder = Decoder(prior)
    whole = decoder.prefill(text_ids, images[:, 0, :2])
    monkeypatch.setattr(decode, "POSITIONS_PER_PASS", 2 * (4 + 9))
    parts = decoder.prefill(text_ids, images[:, 0, :2])
    both = ([prefix.logits, *chain(*prefix.text), *prefix.given] for prefix in (whole, parts))
    for a, b in zip(*both, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(6, 3), (8, 5), (4, 11)])
def test_a_step_reads_what_its_pattern_allows(kind: AttentionKind, grid: int, kernel: int) -> None:
    slots = Slots(kind, grid, kernel)
    offsets, bias = raster_offsets(kind, grid, kernel), slots.bias()
    position_in: dict[int, int] = {}
    for position in range(grid**2):
        position_in[slots.write(position)] = position
        read = slots.read(position)
        found = [
            position_in[slot] for slot in range(read.start, read.stop) if bias is None or bias[position, slot] == 0
        ]
        assert sorted(found) == sorted(position - d for d in offsets if d <= position)
        # A row or column layer's cost is bounded at every position.
        assert read.stop - read.start <= {"row": grid + 1, "column": grid}.get(kind, slots.count)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_hold_what_can_still_be_read(kind: AttentionKind) -> None:
    grid, kernel = 6, 3
    count = Slots(kind, grid, kernel).count
    assert count == {"row": grid + 1, "column": grid**2, "conv": grid + 1 + 1, "full": grid**2}[kind]
    prior = build(f"{kind} ...", grid, 4, kernel)
    text_ids, images = inputs(prior, captions=2, n=1)
    prefix = Decoder(prior).prefill(text_ids, images[:, 0, :20])
    cache = prefix.fork(5)
    for text, image, given, shared in zip(cache.text, cache.image, prefix.given, prefix.text, strict=True):
        assert image.shape == (2, 2, 2, 5, count, 4)
        assert given.shape == (2, 2, 2, min(20, count), 4)
        for forked, original in zip(text, shared, strict=True):
            assert forked.shape == (2, 2, 4, 4)
            assert forked.data_ptr() == original.data_ptr()


@pytest.mark.usefixtures("_small_products")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_bits_are_close(layout: str, precision: Precision) -> None:
    prior = build(layout, 5, 4, 3)
    text_ids, images = inputs(prior, captions=2, n=2, given=7)
    wanted = recomputed(prior, text_ids, images)[:, :, 7:]
    decoder = Decoder(prior, precision)
    found = decoded(decoder, decoder.prefill(text_ids, images[:, 0, :7]), images)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().mean() < 0.03 * wanted.std()
    gap = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert gap.mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_packed_linear_is_linear(dtype: torch.dtype, packs: bool, gelu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs:
        monkeypatch.setattr(cpu_kernels, "can_pack", lambda weight: False)
    generator = torch.Generator().manual_seed(3)
    for inputs_, outputs, shape in [
        (1, 1, (1,)),
        (3, 5, (2, 3)),
        (17, 33, (1, 1)),
        (64, 192, (33,)),
        (64, 256, (2, 40)),
    ]:
        linear = Linear(inputs_, outputs)
        with torch.no_grad():
            linear.weight.normal_(0, inputs_**-0.5, generator=generator)
            linear.bias.normal_(generator=generator)
            x = torch.randn(*shape, inputs_, generator=generator)
            found = PackedLinear(linear, dtype, gelu)(x)
            # Products of 16-bit numbers are exact in 64 bit, so only sums and results are rounded.
            rounded = [y.to(dtype).double() for y in (x, linear.weight, linear.bias)]
            wanted = F.linear(*rounded)
        wanted = F.gelu(wanted) if gelu else wanted
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        assert torch.allclose(found.double(), wanted, atol=1e-5 if dtype == torch.float32 else 0.02)


def gone(*_: object) -> Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")


def changed(*_: object) -> Tensor:
    raise RuntimeError("mkldnn::_linear_pointwise() is missing value for argument")


def wrong(x: Tensor, *_: object) -> Tensor:
    return torch.zeros(len(x), 6, dtype=x.dtype)


@pytest.mark.parametrize(
    ("operator", "other"), [("_pack", gone), ("_pack", changed), ("_multiply", changed), ("_multiply", wrong)]
)
def test_a_build_with_other_operators_decodes_without_them(
    operator: str, other: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, operator, other)
    cpu_kernels.packing_works.cache_clear()
    try:
        assert not cpu_kernels.packing_works(torch.float32)
        assert not cpu_kernels.packing_works(torch.bfloat16)
        prior = build("row ...", 3, 4, 3)
        text_ids, images = inputs(prior, captions=1, n=2)
        decoder = Decoder(prior)
        found = decoded(decoder, decoder.prefill(text_ids), images)
        assert torch.allclose(found, recomputed(prior, text_ids, images), atol=1e-4)
    finally:
        cpu_kernels.packing_works.cache_clear()


def test_misuse_is_refused() -> None:
    prior = build("row ...", 3, 4, 3)
    text_ids, images = inputs(prior, captions=2, n=2)
    decoder = Decoder(prior)
    cache = decoder.prefill(text_ids).fork(2)
    with pytest.raises(ValueError, match="no successor"):
        decoder.step(cache, 8, images[..., 8])
    with pytest.raises(ValueError, match="3 positions"):
        decoder.prefill(text_ids[:, :3])
    with pytest.raises(ValueError, match="leave none of 9 to draw"):
        decoder.prefill(text_ids, images[:, 0])
