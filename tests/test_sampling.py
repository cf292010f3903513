"""Samples of several prompts drawn together, stopped anywhere and gone on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import Call
from running import Chain

from dalle_cli.recipes.schema import SamplingSettings
from dalle_cli.sampling.pipeline import STORE, Sampler, SampleRequest
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.text.bpe import Tokenizer

PROMPTS, N = ["a red star", "a large blue square above a small red cross", "a circle", "two stars"], 3


@pytest.fixture(scope="module")
def sampler(by_hand: Chain) -> Sampler:
    return Sampler(open_checkpoint(by_hand.prior), open_checkpoint(by_hand.dvae), Tokenizer.load(by_hand.tokenizer))


def request(batch_size: int) -> SampleRequest:
    return SampleRequest(PROMPTS, SamplingSettings(n=N, batch_size=batch_size), seed=7)


def drawn(out: Path) -> tuple[np.ndarray, np.ndarray]:
    store = zarr.open_group(str(out / STORE), mode="r")
    return store["tokens"][:], store["log_likelihood"][:]


def test_batches_of_any_size_resumed_by_any_other(sampler: Sampler, tmp_path: Path) -> None:
    lines = list(sampler.run(request(1), tmp_path / "one"))
    assert [(line["prompt_index"], line["index"]) for line in lines] == [(p, i) for p in range(4) for i in range(N)]
    tokens, log_likelihood = drawn(tmp_path / "one")
    assert len(np.unique(tokens, axis=0)) == 4 * N and (log_likelihood < 0).all()
    for first, then, rows in [(2, 64, 3), (2, 7, 4), (64, 1, 5), (7, 2, 8), (3, 6, 1)]:
        out = tmp_path / f"{first}-{then}"
        run = sampler.run(request(first), out)
        stopped = [next(run) for _ in range(rows)]
        run.close()
        again = list(sampler.run(request(then), out))
        assert again[:rows] == stopped and len(again) == 4 * N
        found = drawn(out)
        assert np.array_equal(found[0], tokens) and np.allclose(found[1], log_likelihood, atol=1e-4)
        for line, other in zip(again, lines, strict=True):
            assert Path(line["png"]).read_bytes() == Path(other["png"]).read_bytes()


def test_16_bit_samples_are_others(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    whole, half = tmp_path / "fp32", tmp_path / "bf16"
    assert call("sample", by_hand.prior, *PROMPTS, "--out", whole).code == 0
    assert call("sample", by_hand.prior, *PROMPTS, "--out", half, "--precision", "bf16").code == 0
    a, b = drawn(whole), drawn(half)
    assert not np.array_equal(a[1], b[1]) and abs(a[1].mean() / b[1].mean() - 1) < 0.1
    refused = call("sample", by_hand.prior, *PROMPTS, "--out", whole, "--precision", "bf16").mistake()
    assert str(whole) in refused
