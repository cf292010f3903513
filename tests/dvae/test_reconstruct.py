"""``dalle reconstruct``: the files it writes, its metrics by hand, and its messages about unreadable images."""

from __future__ import annotations

import io
import math
import os
import pty
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call
from helpers.released_dvae import released, save
from helpers.running import DALLE, ENVIRONMENT
from PIL import Image

from dalle_cli.data.images import eval_crop
from dalle_cli.data.open_source import open_source
from dalle_cli.dvae.encode import decode_tokens, encode_images
from dalle_cli.dvae.openai import import_dvae
from dalle_cli.dvae.train import load_dvae
from dalle_cli.stores.checkpoint import Checkpoint, open_checkpoint

SIZE, GAP = 32, 8


@pytest.fixture(scope="module")
def dvae(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("dvae")
    encoder, decoder = released(blocks=1)
    pair = save(encoder, folder / "encoder.pkl"), save(decoder, folder / "decoder.pkl")
    return import_dvae(*pair, folder / "checkpoint", SIZE)


def draw(path: Path, width: int, height: int, seed: int = 0) -> Image.Image:
    """Write an image file, a gradient with noise."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    slope = np.linspace(0, 190, width)[None, :, None] * np.array([1.0, 0.5, 0.2])
    image = Image.fromarray((noise + slope).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def halves(png: str, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return the original and the reconstruction of a written file, after a check of the gap between them."""
    with Image.open(png) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (2 * size + GAP, size))
        pixels = np.asarray(image)
    assert (pixels[:, size : size + GAP] == 255).all()
    return pixels[:, :size], pixels[:, size + GAP :]


def test_pictures_and_figures(dvae: Checkpoint, call: Call, tmp_path: Path) -> None:
    wide, tall, fit = (
        draw(tmp_path / f"{name}.png", *size, seed)
        for seed, (name, size) in enumerate({"wide": (90, 40), "tall": (33, 64), "fit": (32, 32)}.items())
    )
    names = [tmp_path / f"{name}.png" for name in ("wide", "tall", "fit")]
    done = call("reconstruct", "--dvae", dvae.path, *names, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert [line["key"] for line in done.lines] == [str(name) for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000-wide.png", "00001-tall.png", "00002-fit.png",
    ]  # fmt: skip
    model = load_dvae(dvae)
    for image, line in zip((wide, tall, fit), done.lines, strict=True):
        original, rebuilt = halves(line["png"])
        assert np.array_equal(original, eval_crop(image, SIZE))
        tokens = encode_images(model, torch.from_numpy(original.copy())[None], 0.1)
        assert np.array_equal(rebuilt, decode_tokens(model, tokens, 0.1)[0].numpy())
        mse = np.mean((original.astype(float) / 255 - rebuilt.astype(float) / 255) ** 2)
        assert line["mse"] == pytest.approx(mse, abs=1e-8)
        assert line["psnr"] == pytest.approx(10 * math.log10(1 / mse), abs=1e-3)
        assert -1 <= line["ssim"] < 0.9
        assert rebuilt.std() > 5
    assert np.array_equal(halves(done.lines[2]["png"])[0], np.asarray(fit))
    means = {name: np.mean([line[name] for line in done.lines]) for name in ("psnr", "ssim", "mse")}
    last = done.err.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'out'}: 3 images, on average ")
    assert last.endswith(", ".join(f"{name} {mean:.5g}" for name, mean in means.items()))


def test_a_picture_does_not_depend_on_its_company(dvae: Checkpoint, call: Call, tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / "in" / f"{i}.png", 40, 40, i)
    together = call("reconstruct", "--dvae", dvae.path, tmp_path / "in", "--out", tmp_path / "a").lines
    alone = call("reconstruct", "--dvae", dvae.path, tmp_path / "in" / "2.png", "--out", tmp_path / "b").lines
    assert Path(together[2]["png"]).read_bytes() == Path(alone[0]["png"]).read_bytes()
    again = call("reconstruct", "--dvae", dvae.path, tmp_path / "in", "--out", tmp_path / "a").lines
    assert again == together


def test_folders_and_tars_beside_files(dvae: Checkpoint, call: Call, tmp_path: Path) -> None:
    assert call("make-shapes", tmp_path / "shapes", "--n", 3, "--test-n", 2, "--size", 32).code == 0
    draw(tmp_path / "in" / "cats" / "a cat.jpg", 50, 50)
    draw(tmp_path / "in" / "dogs" / "a cat.png", 50, 50)
    draw(tmp_path / "one.webp", 50, 50)
    specs = (tmp_path / "one.webp", tmp_path / "in", *(tmp_path / "shapes" / "train").glob("*.tar"))
    done = call("reconstruct", *specs, "--dvae", dvae.path, "--out", tmp_path / "out", "--size", 16)
    assert done.code == 0, done.err
    keys = [line["key"] for line in done.lines]
    assert keys[:3] == [str(tmp_path / "one.webp"), "cats/a cat", "dogs/a cat"]
    assert len(keys) == 6
    names = [Path(line["png"]).name for line in done.lines]
    assert names[:3] == ["00000-one.png", "00001-a_cat.png", "00002-a_cat.png"]
    for line in done.lines:
        halves(line["png"], 16)


def test_reconstructions_alone_have_their_captions_beside(dvae: Checkpoint, call: Call, tmp_path: Path) -> None:
    assert call("make-shapes", tmp_path / "shapes", "--n", 2, "--test-n", 2, "--size", 32).code == 0
    draw(tmp_path / "one.png", 40, 40)
    specs = (*(tmp_path / "shapes" / "train").glob("*.tar"), tmp_path / "one.png")
    both, alone = (
        call("reconstruct", *specs, "--dvae", dvae.path, "--out", tmp_path / out, *more)
        for out, more in (("both", []), ("alone", ["--alone"]))
    )
    assert alone.code == 0, alone.err
    source = open_source(str(specs[0]))
    for row, (line, other) in enumerate(zip(alone.lines, both.lines, strict=True)):
        assert np.array_equal(np.asarray(Image.open(line["png"])), halves(other["png"])[1])
        beside = Path(line["png"]).with_suffix(".txt")
        assert not Path(other["png"]).with_suffix(".txt").exists()
        assert beside.read_text().splitlines() == source.captions(row) if row < 2 else not beside.exists()


def test_bad_pictures_are_passed_over_and_named(dvae: Checkpoint, call: Call, tmp_path: Path) -> None:
    draw(tmp_path / "in" / "good.png", 40, 40)
    (tmp_path / "in" / "junk.jpg").write_bytes(b"junk")
    whole = io.BytesIO()
    draw(tmp_path / "other.png", 40, 40).save(whole, "PNG")
    (tmp_path / "in" / "cut.png").write_bytes(whole.getvalue()[:-300])
    missing, pipe = tmp_path / "missing.png", tmp_path / "pipe.png"
    os.mkfifo(pipe)
    done = call("reconstruct", tmp_path / "in", missing, pipe, "--dvae", dvae.path, "--out", tmp_path / "out")
    assert done.code == 0
    assert [line["key"] for line in done.lines] == ["good"]
    assert "skipped junk: no image of a known format\n" in done.err
    assert "skipped cut: " in done.err
    assert f"skipped {missing}: the image cannot be read: No such file" in done.err
    assert f"skipped {pipe}: the image is not an ordinary file\n" in done.err  # reading it would block for ever
    assert "4 of 5 images skipped\n" in done.err

    refused = call("reconstruct", missing, tmp_path / "in" / "junk.jpg", "--dvae", dvae.path, "--out", tmp_path / "no")
    assert f"none of the 2 images can be read ({missing}: the image cannot be read: " in refused.mistake()
    assert not (tmp_path / "no").exists()
    assert refused.out == ""


def test_mistakes_are_one_line(dvae: Checkpoint, call: Call, tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 40, 40)
    out = ("--out", tmp_path / "out")
    refused = call("reconstruct", tmp_path / "a.png", "--dvae", dvae.path, *out, "--size", 20)
    assert "--size 20 is not a multiple of 8" in refused.mistake()
    refused = call("reconstruct", tmp_path / "nowhere", "--dvae", dvae.path, *out)
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in refused.mistake()
    assert "holds no checkpoint" in call("reconstruct", tmp_path / "a.png", "--dvae", tmp_path, *out).mistake()
    refused = call("reconstruct", tmp_path / "a.png", "--dvae", dvae.path, "--out", tmp_path / "a.png")
    assert refused.code == 2
    assert "is a file" in refused.err
    assert open_checkpoint(dvae.path).identity == dvae.identity


def test_a_terminal_gets_a_table_with_the_means(
    dvae: Checkpoint, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"[red]{i}.png" for i in range(2)]
    for i, name in enumerate(names):
        draw(Path(name), 40, 40, i)
    command = ["reconstruct", *names, "--dvae", str(dvae.path), "--out", "out"]
    lines = call(*command).lines
    ours, theirs = pty.openpty()
    subprocess.run([DALLE, *command], stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT, check=True, timeout=120)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    rows = shown.decode().splitlines()
    for line in lines:
        (row,) = [row for row in rows if line["key"] in row]
        assert f"{line['psnr']:.5g}" in row
        assert f"{line['ssim']:.5g}" in row
        assert f"{line['mse']:.5g}" in row
    (mean,) = [row for row in rows if "mean of 2" in row]
    assert f"{np.mean([line['psnr'] for line in lines]):.5g}" in mean
    assert "{" not in shown.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed and everything has been read
        return b""
