"""Drawings at the prior's validations are those of greedy decoding, change no weights, and are in the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call
from helpers.decoding import recomputed
from helpers.html_page import Page
from helpers.running import Chain
from PIL import Image
from torch import Tensor

from dalle_cli.config.load import load_recipe
from dalle_cli.dvae.encode import decode_tokens
from dalle_cli.dvae.train import load_dvae
from dalle_cli.prior.model import load_prior
from dalle_cli.prior.train import read_tokens
from dalle_cli.sampling.drawings import Drawings, held_out_drawing
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.tokens import TokenReader


def cells(sheet: Tensor, size: int) -> list[list[np.ndarray]]:
    """Cut a sheet (3, H, W), whose pictures have rules of two pixels around them, into rows of pictures."""
    rows, columns = (range(2, side - size, size + 2) for side in sheet.shape[1:])
    return [[sheet[:, y : y + size, x : x + size].permute(1, 2, 0).numpy() for x in columns] for y in rows]


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_drawings_are_the_pictures_of_the_captions_tokens(precision: str, by_hand: Chain) -> None:
    """Training draws in 32 bit, whether or not it runs on a CPU, and measures nothing."""
    settings = ["temperature=0", "guidance=3", f"precision={precision}"]
    recipe = load_recipe(by_hand.recipe, ["prior.drawings=3", *(f"sampling.{setting}" for setting in settings)])
    drawing = held_out_drawing(recipe, by_hand.tokens, by_hand.dvae)
    assert isinstance(drawing, Drawings)
    prior, dvae = load_prior(open_checkpoint(by_hand.prior, "prior")), load_dvae(open_checkpoint(by_hand.dvae, "dvae"))
    batch = read_tokens(TokenReader(by_hand.tokens), np.arange(5))
    with torch.no_grad():
        true, drawn = cells(drawing(prior, batch), 32)
        tokens = torch.zeros(3, 1, 16, dtype=torch.int64)
        ids = prior.with_padding(batch.text[:3], batch.length[:3])
        for position in range(16):
            tokens[..., position] = recomputed(prior, ids, tokens)[..., position, :].argmax(-1)
        expected = decode_tokens(dvae, tokens.view(3, 4, 4), drawing.eps).numpy()
        originals = decode_tokens(dvae, batch.image[:3].view(3, 4, 4), drawing.eps).numpy()
    np.testing.assert_array_equal(np.stack(true), originals)
    np.testing.assert_array_equal(np.stack(drawn), expected)


def test_nothing_is_drawn_without_the_dvae_of_the_store(by_hand: Chain, tmp_path: Path) -> None:
    asked = load_recipe(by_hand.recipe, ["prior.drawings=3"])
    assert held_out_drawing(load_recipe(by_hand.recipe), by_hand.tokens, by_hand.dvae) is None
    assert held_out_drawing(asked, by_hand.tokens, tmp_path / "none") is None


def test_a_run_with_drawings_has_the_same_weights_and_shows_them(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    places = ("--tokens", by_hand.tokens, "--dvae", by_hand.dvae, "--out", run / "prior")
    settings = ("--set", "prior.drawings=2", "--set", "prior.training.validate_every=4")
    done = call("train-prior", by_hand.recipe, *places, *settings)
    assert done.code == 0, done.err
    weights = [next(prior.glob("step-*12")) / "ema.safetensors" for prior in (run / "prior", by_hand.prior)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    names = [f"drawings-{step:08d}.png" for step in (4, 8, 12)]
    assert sorted(file.name for file in (run / "prior" / "validation").iterdir()) == names
    assert Image.open(run / "prior" / "validation" / names[0]).size == (2 * 34 + 2, 2 * 34 + 2)
    reported = call("report", by_hand.recipe, "--set", f"run={run}", "--set", "prior.drawings=2")
    assert reported.code == 0, reported.err
    page = Page((run / "report.html").read_text())
    assert "drawn after 4, 8, 12 updates" in page.text
    assert "held-out captions drawn at each validation" in page.images
