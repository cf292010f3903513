"""Import of OpenAI's released dVAE: the same logits, tokens and reconstructions, or one clear line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import Call
from helpers.released_dvae import Conv2d, Decoder, Encoder, as_torch_1_7, released, save
from helpers.running import ENVIRONMENT, smallest_recipe, write_recipe
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.dvae.encode import decode_tokens, encode_images
from dalle_cli.dvae.openai import import_dvae, read_released
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.files import sha256_file
from dalle_cli.stores.tokens import TokenReader

EPS = 0.1


def pixels(n: int, side: int = 32) -> Tensor:
    """Return (n, side, side, 3) uint8, coarse blocks with noise on them."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 200, (n, side // 8, side // 8, 3), generator=generator)
    fine = torch.randint(0, 56, (n, side, side, 3), generator=generator)
    return (coarse.repeat_interleave(8, 1).repeat_interleave(8, 2) + fine).to(torch.uint8)


@torch.no_grad()
def by_modules(encoder: nn.Module, decoder: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, the decoder's output and the reconstruction as pixels 0..255, as the package computes them."""
    x = (1 - 2 * EPS) * pictures.permute(0, 3, 1, 2).float() / 255 + EPS
    logits = encoder(x)
    z = F.one_hot(logits.argmax(dim=1), num_classes=logits.shape[1]).permute(0, 3, 1, 2).float()
    output = decoder(z)
    rebuilt = ((torch.sigmoid(output[:, :3]) - EPS) / (1 - 2 * EPS)).clamp(0, 1) * 255
    return logits, output, rebuilt.permute(0, 2, 3, 1)


def files(folder: Path, encoder: object, decoder: object, *, legacy: bool = False) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    return (
        save(encoder, folder / "encoder.pkl", legacy=legacy),
        save(decoder, folder / "decoder.pkl", legacy=legacy),
    )


def stored_in_one(module: nn.Module) -> None:
    """Make every parameter a transposed part of one storage."""
    parameters = list(module.parameters())
    flat = torch.cat([parameter.detach().transpose(0, -1).flatten() for parameter in parameters])
    at = 0
    for parameter in parameters:
        swapped = parameter.detach().transpose(0, -1)
        parameter.data = flat[at : at + parameter.numel()].view(swapped.shape).transpose(0, -1)
        at += parameter.numel()
        assert parameter.ndim == 1 or not parameter.is_contiguous()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("change", [None, as_torch_1_7, stored_in_one, "channels last"])
def test_logits_tokens_and_pictures_are_those_of_the_modules(tmp_path: Path, call: Call, legacy: bool, change) -> None:  # type: ignore[no-untyped-def]
    encoder, decoder = released()
    pictures = pixels(4)
    logits, output, rebuilt = by_modules(encoder, decoder, pictures)
    for module in (encoder, decoder):
        if change == "channels last":
            module.to(memory_format=torch.channels_last)
        elif change is not None:
            change(module)
    done = call("import-dvae", *files(tmp_path, encoder, decoder, legacy=legacy), tmp_path / "out")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    assert not [name for name in sys.modules if name.startswith("dall_e")]

    model = load_dvae(open_checkpoint(tmp_path / "out", "dvae"))
    x = (1 - 2 * EPS) * pictures.permute(0, 3, 1, 2).float() / 255 + EPS
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(x), logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cat(model(x), dim=1), output, atol=1e-4, rtol=0)
    tokens = encode_images(model, pictures, EPS)
    assert torch.equal(tokens, logits.argmax(dim=1))
    assert len(tokens.unique()) > 3
    assert float((decode_tokens(model, tokens, EPS).float() - rebuilt).abs().max()) <= 0.5 + 1e-2
    assert float(rebuilt.std()) > 20  # the images are not all one grey


def test_the_checkpoint_is_one_of_ours(tmp_path: Path, call: Call) -> None:
    pair = files(tmp_path, *released(blocks=1, n_init=5))
    checkpoint = import_dvae(*pair, tmp_path / "out", 64)
    assert (checkpoint.kind, checkpoint.step, checkpoint.belongs) == ("dvae", 0, {})
    recipe = checkpoint.recipe()
    assert (recipe.image_size, recipe.grid, recipe.dvae.objective.logit_laplace_eps) == (64, 8, 0.1)
    model = recipe.dvae.model
    assert (model.n_hid, model.n_init, model.blocks_per_group, model.codebook_size) == (8, 5, 1, 64)
    raw, ema = checkpoint.tensors("raw"), checkpoint.tensors("ema")
    assert raw.keys() == ema.keys()
    assert all(torch.equal(raw[name], ema[name]) for name in raw)
    _, state = checkpoint.trainer()
    assert state == {"imported": {path.name: sha256_file(path) for path in pair}}
    again = import_dvae(*pair, tmp_path / "again", 64)
    assert again.files == checkpoint.files
    shown = call("show", tmp_path / "out", "--json")
    assert json.loads(shown.out)["kind"] == "dvae"


def test_the_rest_of_the_chain_takes_it(tmp_path: Path, call: Call) -> None:
    root, dvae = tmp_path, tmp_path / "dvae"
    settings = smallest_recipe(root / "run", root / "shapes" / "train")
    settings["dvae"]["model"]["codebook_size"] = 64
    recipe = write_recipe(root, settings)
    for arguments in (
        ("make-shapes", root / "shapes", "--n", 24, "--test-n", 2, "--size", 32),
        ("train-tokenizer", recipe),
        ("tokenize-text", recipe),
        ("import-dvae", *files(root, *released()), dvae, "--image-size", 32),
        ("encode-images", recipe, "--dvae", dvae),
        ("train-prior", recipe, "--set", "prior.training.updates=2"),
    ):
        done = call(*arguments)
        assert done.code == 0, done.err
    done = call("sample", root / "run" / "prior", "a red circle", "--n", 2, "--dvae", dvae)
    assert done.code == 0, done.err
    model = load_dvae(open_checkpoint(dvae))
    for line in done.lines:
        tokens = np.asarray(zarr.open_group(line["store"], mode="r")["tokens"][line["row"]]).astype(np.int64)
        expected = decode_tokens(model, torch.from_numpy(tokens)[None], EPS)[0].numpy()
        assert np.array_equal(np.asarray(Image.open(line["png"])), expected)
    assert open_checkpoint(root / "run" / "prior").belongs["dvae"] == open_checkpoint(dvae).identity
    assert TokenReader(root / "run" / "tokens.zarr").read("image", np.arange(24)).max() < 64


WITH_THE_PACKAGE = """
import sys
import numpy as np
import torch
from dall_e.decoder import Decoder
from dall_e.encoder import Encoder
from dall_e.utils import map_pixels, unmap_pixels

folder, legacy = sys.argv[1], sys.argv[2] == "legacy"
torch.manual_seed(0)
encoder = Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
decoder = Decoder(n_init=16, n_hid=64, n_blk_per_group=1, vocab_size=512)
for name, module in (("encoder", encoder), ("decoder", decoder)):
    for parameter in module.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.05
    torch.save(module, f"{folder}/{name}.pkl", _use_new_zipfile_serialization=not legacy)
pictures = torch.from_numpy(np.load(f"{folder}/pictures.npy")).permute(0, 3, 1, 2).float() / 255
with torch.no_grad():
    logits = encoder(map_pixels(pictures))
    tokens = logits.argmax(dim=1)
    output = decoder(torch.nn.functional.one_hot(tokens, 512).permute(0, 3, 1, 2).float())
    rebuilt = unmap_pixels(torch.sigmoid(output[:, :3]))
np.savez(f"{folder}/package.npz", logits=logits, tokens=tokens, output=output, rebuilt=rebuilt)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("dall_e") is None,
    reason="OpenAI's package is not installed; it asks for packages it does not need and leaves out one it does: "
    "pip install --no-deps DALL-E && pip install attrs requests",
)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_the_published_package_computes_the_same(tmp_path: Path, layout: str) -> None:
    pictures = pixels(2, 64)
    np.save(tmp_path / "pictures.npy", pictures.numpy())
    subprocess.run([sys.executable, "-c", WITH_THE_PACKAGE, str(tmp_path), layout], check=True, env=ENVIRONMENT)
    theirs = {name: torch.from_numpy(value) for name, value in np.load(tmp_path / "package.npz").items()}
    model = load_dvae(import_dvae(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl", tmp_path / "out", 64))
    x = (1 - 2 * EPS) * pictures.permute(0, 3, 1, 2).float() / 255 + EPS
    tokens = encode_images(model, pictures, EPS)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(x), theirs["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cat(model(x), dim=1), theirs["output"], atol=1e-4, rtol=0)
    assert torch.equal(tokens, theirs["tokens"])
    assert len(tokens.unique()) > 3
    rebuilt = decode_tokens(model, tokens, EPS).permute(0, 3, 1, 2).float()
    assert float((rebuilt - theirs["rebuilt"] * 255).abs().max()) <= 0.5 + 1e-2


# What does not fit


def widened(encoder: Encoder, decoder: Decoder) -> None:
    encoder.blocks.group_2.block_1.res_path.conv_1 = Conv2d(8, 8, 3)


def other_kernel(encoder: Encoder, decoder: Decoder) -> None:
    encoder.blocks.group_1.block_1.res_path.conv_4.kw = 3


def louder(encoder: Encoder, decoder: Decoder) -> None:
    decoder.blocks.group_3.block_2.post_gain = 1.0


def smooth(encoder: Encoder, decoder: Decoder) -> None:
    decoder.blocks.group_1.upsample = nn.Upsample(scale_factor=2, mode="bilinear")


def wide_pool(encoder: Encoder, decoder: Decoder) -> None:
    encoder.blocks.group_3.pool = nn.MaxPool2d(3, stride=2, padding=1)


def no_pool(encoder: Encoder, decoder: Decoder) -> None:
    del encoder.blocks.group_3.pool


def reordered(encoder: Encoder, decoder: Decoder) -> None:
    path = encoder.blocks.group_1.block_1.res_path
    path._modules = dict(reversed(path._modules.items()))


def nameless(encoder: Encoder, decoder: Decoder) -> None:
    encoder.blocks.output.conv._parameters = {"w": encoder.blocks.output.conv.w}


def buffered(encoder: Encoder, decoder: Decoder) -> None:
    encoder.blocks.input.register_buffer("mean", torch.zeros(3))


def linear(encoder: Encoder, decoder: Decoder) -> None:
    decoder.blocks.output.relu = nn.Identity()


def unpacked(encoder: Encoder, decoder: Decoder) -> None:
    encoder.blocks.input._parameters = {"w": None, "b": encoder.blocks.input.b}


def damaged(encoder: Encoder, decoder: Decoder) -> None:
    decoder.blocks.input.b.data[2] = float("nan")


def halved(encoder: Encoder, decoder: Decoder) -> None:
    encoder.half()


def grey(encoder: Encoder, decoder: Decoder) -> None:
    encoder.input_channels = 1


def endless(encoder: Encoder, decoder: Decoder) -> None:
    encoder.n_blk_per_group = decoder.n_blk_per_group = 10**9


def enormous(encoder: Encoder, decoder: Decoder) -> None:
    encoder.n_hid = decoder.n_hid = 60_000


def worded(encoder: Encoder, decoder: Decoder) -> None:
    encoder.n_hid = decoder.n_hid = "256"


def one_code(encoder: Encoder, decoder: Decoder) -> None:
    encoder.vocab_size = decoder.vocab_size = 1


def repeated(encoder: Encoder, decoder: Decoder) -> None:
    """Give all parameters one storage, so that they have more values than the file has bytes for."""
    shared = torch.zeros(max(parameter.numel() for parameter in encoder.parameters()))
    for parameter in encoder.parameters():
        parameter.data = shared[: parameter.numel()].view(parameter.shape)


MISFITS: list[tuple[Callable[[Encoder, Decoder], None], str, str]] = [
    (
        widened,
        "encoder.pkl",
        "blocks.group_2.block_1.res_path.conv_1.w has shape (8, 8, 3, 3), a dVAE of its sizes has (4, 8, 3, 3)",
    ),
    (other_kernel, "encoder.pkl", "blocks.group_1.block_1.res_path.conv_4.kw is 3 where our dVAE has 1"),
    (louder, "decoder.pkl", "blocks.group_3.block_2.post_gain is 1.0 where our dVAE has 0.015625"),
    (smooth, "decoder.pkl", "blocks.group_1.upsample.mode is 'bilinear' where our dVAE has 'nearest'"),
    (wide_pool, "encoder.pkl", "blocks.group_3.pool.kernel_size is 3 where our dVAE has 2"),
    (no_pool, "encoder.pkl", "blocks.group_3 has 'block_1, block_2' where our dVAE has 'block_1, block_2, pool'"),
    (reordered, "encoder.pkl", "blocks.group_1.block_1.res_path has 'conv_4, relu_4"),
    (nameless, "encoder.pkl", "blocks.output.conv has 'w' where our dVAE has 'w, b'"),
    (buffered, "encoder.pkl", "blocks.input has 'mean'"),
    (linear, "decoder.pkl", "blocks.output.relu is an object of 'torch.nn.modules.linear.Identity'"),
    (unpacked, "encoder.pkl", "blocks.input.w is None, not a tensor"),
    (damaged, "decoder.pkl", "blocks.input.b has values that are not finite"),
    (halved, "encoder.pkl", "it names 'torch.HalfStorage', which is not on the allowlist"),
    (grey, "encoder.pkl", "input_channels is 1, not 3"),
    (endless, "encoder.pkl", "n_blk_per_group is 1000000000, not a whole number from 1 to 64"),
    (enormous, "encoder.pkl", "blocks.input.w has shape (8, 3, 7, 7), a dVAE of its sizes has (60000, 3, 7, 7)"),
    (worded, "encoder.pkl", "n_hid is '256', not a whole number"),
    (one_code, "encoder.pkl", "its sizes are not those of a dVAE (codebook_size: "),
    (repeated, "encoder.pkl", "its parameters are larger than the file"),
]


@pytest.mark.parametrize(("change", "file", "why"), MISFITS, ids=[change.__name__ for change, _, _ in MISFITS])
def test_what_does_not_fit_is_named(
    tmp_path: Path, call: Call, change: Callable[[Encoder, Decoder], None], file: str, why: str
) -> None:
    encoder, decoder = released()
    change(encoder, decoder)
    refused = call("import-dvae", *files(tmp_path, encoder, decoder), tmp_path / "out").mistake()
    assert refused.startswith(f"dalle: {tmp_path / file}: {why}")
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_not_stated_is_the_published_one(tmp_path: Path) -> None:
    encoder, decoder = released()
    del encoder.n_hid, decoder.n_hid
    with pytest.raises(UserError, match=r"input\.w has shape \(8, 3, 7, 7\), a dVAE of its sizes has \(256, 3, 7, 7\)"):
        read_released(*files(tmp_path, encoder, decoder))
    encoder, decoder = released(blocks=2)
    del encoder.n_blk_per_group, decoder.n_blk_per_group
    assert read_released(*files(tmp_path, encoder, decoder)).settings.blocks_per_group == 2


def test_the_two_files_mixed_up(tmp_path: Path, call: Call) -> None:
    encoder, decoder = files(tmp_path, *released())
    out = tmp_path / "out"
    assert "they are swapped; give the encoder first" in call("import-dvae", decoder, encoder, out).mistake()
    refused = call("import-dvae", encoder, encoder, out).mistake()
    assert f"{encoder}: holds dall_e.encoder.Encoder where the decoder is needed" in refused
    refused = call("import-dvae", decoder, decoder, out).mistake()
    assert f"{decoder}: holds dall_e.decoder.Decoder where the encoder is needed" in refused
    _, other = files(tmp_path / "other", *released(vocab=32))
    refused = call("import-dvae", encoder, other, out).mistake()
    assert f"{encoder} has vocab_size 64, {other} has 32" in refused
    layer = save(nn.ReLU(), tmp_path / "layer.pkl")
    refused = call("import-dvae", layer, decoder, out).mistake()
    assert "holds an object of 'torch.nn.modules.activation.ReLU' where dall_e.encoder.Encoder is needed" in refused
    weights = save({"n_hid": 8}, tmp_path / "weights.pkl")
    assert "holds a dict where dall_e.encoder.Encoder is needed" in call("import-dvae", weights, decoder, out).mistake()
    assert not out.exists()


def test_places_and_sizes_that_will_not_do(tmp_path: Path, call: Call) -> None:
    pair = files(tmp_path, *released(blocks=1))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert f"{full}: already exists" in call("import-dvae", *pair, full).mistake()
    assert (full / "mine.txt").read_text() == "mine"
    assert "is not a multiple of 8" in call("import-dvae", *pair, tmp_path / "out", "--image-size", 60).mistake()
    missing = tmp_path / "missing.pkl"
    assert f"{missing}: cannot be read" in call("import-dvae", missing, pair[1], tmp_path / "out").mistake()
    assert f"{full}: is not a file" in call("import-dvae", pair[0], full, tmp_path / "out").mistake()
    empty = tmp_path / "empty.pkl"
    empty.touch()
    assert f"{empty}: empty" in call("import-dvae", empty, pair[1], tmp_path / "out").mistake()
    (tmp_path / "free").mkdir()
    assert call("import-dvae", *pair, tmp_path / "free", "--image-size", 72).code == 0
