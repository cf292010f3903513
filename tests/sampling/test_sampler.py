"""Samples of several prompts: drawn together, alone or in shards, stopped anywhere, guided, or below given rows."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import Call
from helpers.running import smallest_recipe
from helpers.untrained import make_untrained
from PIL import Image

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe, SamplingSettings
from dalle_cli.data.images import eval_crop
from dalle_cli.data.workers import map_blocks
from dalle_cli.dvae.encode import encode_images
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior import cpu_kernels
from dalle_cli.prior.model import load_prior
from dalle_cli.sampling import sampler as pipeline
from dalle_cli.sampling.request import Prime, SampleRequest, shard_folder
from dalle_cli.sampling.sampler import Sampler
from dalle_cli.stores import samples as store
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.samples import STORE
from dalle_cli.stores.shards import Shard
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.encode import CaptionEncoder

MAX_PIXELS = 10**6
PROMPTS, N, GRID = ["a red star", "a large blue square above a small red cross", "a circle", "two stars"], 3, 4


def chain(folder: Path, caption_dropout: float) -> RunFolders:
    recipe = smallest_recipe(folder, None)
    recipe["prior"]["caption_dropout"] = caption_dropout
    return make_untrained(Recipe.model_validate(recipe), folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> RunFolders:
    return chain(tmp_path_factory.mktemp("chain"), 0.0)


@pytest.fixture(scope="module")
def guidable(tmp_path_factory: pytest.TempPathFactory) -> RunFolders:
    return chain(tmp_path_factory.mktemp("guidable"), 0.1)


def sampler_of(places: RunFolders) -> Sampler:
    return Sampler(open_checkpoint(places.prior), open_checkpoint(places.dvae), Tokenizer.load(places.tokenizer))


@pytest.fixture(scope="module")
def sampler(places: RunFolders) -> Sampler:
    return sampler_of(places)


def request(batch_size: int | None = None, **other: Any) -> SampleRequest:
    return SampleRequest(PROMPTS, SamplingSettings(n=N, batch_size=batch_size), seed=7, **other)


def drawn(out: Path) -> tuple[np.ndarray, np.ndarray]:
    group = zarr.open_group(str(out / STORE), mode="r")
    return group["tokens"][:], group["log_likelihood"][:]


def pictures(lines: list[dict[str, Any]]) -> dict[tuple[str, int], bytes]:
    return {(line["prompt"], line["index"]): Path(line["png"]).read_bytes() for line in lines}


@pytest.fixture(scope="module")
def whole(sampler: Sampler, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return list(sampler.run(request(), tmp_path_factory.mktemp("whole") / "all"))


def test_batches_of_any_size_resumed_by_any_other(sampler: Sampler, tmp_path: Path) -> None:
    lines = list(sampler.run(request(1), tmp_path / "one"))
    assert [(line["prompt_index"], line["index"]) for line in lines] == [(p, i) for p in range(4) for i in range(N)]
    tokens, log_likelihood = drawn(tmp_path / "one")
    assert len(np.unique(tokens, axis=0)) == 4 * N
    assert (log_likelihood < 0).all()
    for first, then, rows in [(2, 64, 3), (2, 7, 4), (64, None, 5), (7, 2, 8), (3, 6, 1)]:
        out = tmp_path / f"{first}-{then}"
        run = sampler.run(request(first), out)
        stopped = [next(run) for _ in range(rows)]
        run.close()
        again = list(sampler.run(request(then), out))
        assert again[:rows] == stopped
        assert len(again) == 4 * N
        found = drawn(out)
        assert np.array_equal(found[0], tokens)
        assert np.allclose(found[1], log_likelihood, atol=1e-4)
        for line, other in zip(again, lines, strict=True):
            assert Path(line["png"]).read_bytes() == Path(other["png"]).read_bytes()


def test_equal_prompts_have_other_samples(
    sampler: Sampler, whole: list[dict[str, Any]], places: RunFolders, tmp_path: Path
) -> None:
    """The samples of a prompt's first occurrence do not depend on the other prompts."""
    repeated = SampleRequest([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], SamplingSettings(n=N), seed=7)
    lines = list(sampler.run(repeated, tmp_path / "repeated"))
    assert len(np.unique(drawn(tmp_path / "repeated")[0], axis=0)) == 4 * N
    wanted = {key: png for key, png in pictures(whole).items() if key[0] in PROMPTS[:2]}
    assert pictures([line for line in lines if line["prompt_index"] < 2]) == wanted
    prior = open_checkpoint(places.prior)
    assert repeated.identity(prior)["equal_prompts"] == "differ"  # a store of an earlier version is another request's
    assert "equal_prompts" not in request().identity(prior)


def test_lines_come_while_later_samples_are_drawn(sampler: Sampler, tmp_path: Path, counted: list[int]) -> None:
    run = sampler.run(request(1), tmp_path / "s")
    for row in range(4 * N):
        line = next(run)
        assert Path(line["png"]).is_file()
        assert int(zarr.open_group(line["store"], mode="r").attrs["rows"]) > row
        assert len(counted) <= row + 2
    assert next(run, None) is None
    assert counted == [1] * 4 * N


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of the batches drawn so far."""
    sizes: list[int] = []
    original = pipeline.sample_images

    def counting(decoder: Any, text_ids: Any, uniforms: Any, *arguments: Any, **more: Any) -> Any:
        sizes.append(uniforms.shape[0] * uniforms.shape[1])
        return original(decoder, text_ids, uniforms, *arguments, **more)

    monkeypatch.setattr(pipeline, "sample_images", counting)
    return sizes


def test_any_sample_is_drawn_again_alone(
    places: RunFolders, whole: list[dict[str, Any]], call: Call, tmp_path: Path
) -> None:
    alone = call("sample", places.prior, PROMPTS[1], "--index", 2, "--seed", 7, "--out", tmp_path / "a")
    (line,) = alone.lines
    assert (line["index"], line["row"]) == (2, 0)
    assert Path(line["png"]).name == "00000-a_large_blue_square_above_a_small_red_cr-00002.png"
    assert pictures([line]).items() <= pictures(whole).items()
    (same,) = [other for other in whole if (other["prompt"], other["index"]) == (PROMPTS[1], 2)]
    assert line["log_likelihood"] == pytest.approx(same["log_likelihood"], abs=1e-3)
    some = call("sample", places.prior, *PROMPTS, "--index", 1, "--n", 2, "--seed", 7, "--out", tmp_path / "b")
    assert [line["index"] for line in some.lines] == [1, 2] * 4
    assert pictures(some.lines).items() <= pictures(whole).items()
    far = call("sample", places.prior, PROMPTS[0], "--index", 100, "--seed", 7, "--out", tmp_path / "c")
    assert [line["index"] for line in far.lines] == [100]
    assert not pictures(far.lines).items() & pictures(whole).items()
    refused = call("sample", places.prior, PROMPTS[1], "--index", 1, "--seed", 7, "--out", tmp_path / "a").mistake()
    assert "other prompts, settings or models" in refused


@pytest.mark.parametrize("of", [2, 3, 5, 20])
def test_shares_joined_are_the_whole(sampler: Sampler, whole: list[dict[str, Any]], tmp_path: Path, of: int) -> None:
    out = tmp_path / "drawn"
    lines, tokens = [], []
    for number in range(1, of + 1):
        share = request(shard=Shard(number, of))
        own = list(sampler.run(share, out))
        assert [line["row"] for line in own] == list(range(len(own)))
        folder = shard_folder(out, share.shard)
        assert folder.exists() == bool(own)
        if own:
            assert folder == tmp_path / "drawn.parts" / f"samples-{number:04d}-of-{of:04d}"
            tokens.append(drawn(folder)[0])
        if of <= len(PROMPTS):  # prompts are not split while there are enough
            assert {line["index"] for line in own} == set(range(N))
        lines += own
    assert pictures(lines) == pictures(whole)
    own_keys = ("prompt", "prompt_index", "index", "seed")
    assert [[line[key] for key in own_keys] for line in lines] == [[line[key] for key in own_keys] for line in whole]
    assert np.array_equal(np.concatenate(tokens), drawn(Path(whole[0]["store"]).parent)[0])


def test_a_share_goes_on_where_it_stopped(sampler: Sampler, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    share = request(1, shard=Shard(4, 5))
    run = sampler.run(share, tmp_path / "s")
    first = next(run)
    run.close()
    again = list(sampler.run(share, tmp_path / "s"))
    assert again[0] == first
    assert len(again) == len(share.rows) == 2
    assert pictures(again).items() <= pictures(whole).items()


def test_shares_on_the_command_line(places: RunFolders, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "s"
    done = [call("sample", places.prior, *PROMPTS, "--out", out, "--n", 1, "--shard", f"{i}/2") for i in (1, 2)]
    assert [line["prompt"] for part in done for line in part.lines] == PROMPTS
    kept = call("sample", places.prior, *PROMPTS, "--n", 1, "--shard", "2/2").lines[0]
    plain = call("sample", places.prior, *PROMPTS, "--n", 1).lines[0]
    assert Path(kept["png"]).parents[1] == Path(plain["png"]).parent.with_name(
        Path(plain["png"]).parent.name + ".parts"
    )
    assert "--shard 3/2" in call("sample", places.prior, *PROMPTS, "--shard", "3/2").mistake()


def test_ids_of_prompts_are_kept(places: RunFolders, call: Call, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"caption": "a red star", "id": 17, "image_id": "x"}, {"prompt": "a circle"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("sample", places.prior, "--captions", file, "--n", 2, "--out", tmp_path / "a")
    assert [(line["prompt"], line.get("id"), line.get("image_id")) for line in done.lines] == [
        *[("a red star", 17, "x")] * 2,
        *[("a circle", None, None)] * 2,
    ]
    coco = tmp_path / "captions_val.json"
    coco.write_text(json.dumps({"annotations": [{"id": 3, "image_id": 4, "caption": "a circle"}]}))
    (line,) = call("sample", places.prior, "--captions", coco, "--n", 1, "--out", tmp_path / "b").lines
    assert (line["prompt"], line["id"], line["image_id"]) == ("a circle", 3, 4)


# --- guidance


def test_guidance_is_refused_where_captions_were_never_dropped(places: RunFolders, call: Call, tmp_path: Path) -> None:
    refused = call("sample", places.prior, "a star", "--guidance", 3, "--out", tmp_path / "s").mistake()
    assert "prior.caption_dropout: 0" in refused
    assert str(places.prior) in refused
    assert not (tmp_path / "s").exists()
    assert call("sample", places.prior, "a star", "--guidance", 1, "--out", tmp_path / "s").code == 0


def test_guided_samples_do_not_depend_on_the_batch(guidable: RunFolders, tmp_path: Path) -> None:
    guided, found = sampler_of(guidable), []
    for size in (1, 2, 64):
        settings = SamplingSettings(n=N, batch_size=size, guidance=3.0)
        found.append(list(guided.run(SampleRequest(PROMPTS, settings, 7), tmp_path / str(size))))
    assert pictures(found[0]) == pictures(found[1]) == pictures(found[2])
    plain = list(guided.run(request(), tmp_path / "plain"))
    assert pictures(plain) != pictures(found[0])
    with pytest.raises(UserError, match="other prompts, settings or models"):
        list(guided.run(request(), tmp_path / "1"))


# --- image-to-image


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of another size than the model's, and not square."""
    file = tmp_path_factory.mktemp("given") / "given.png"
    pixels = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(np.kron(pixels, np.ones((16, 16, 1), np.uint8))).save(file)
    return file


def test_the_given_rows_stay_and_the_drawn_ones_are_scored(
    sampler: Sampler, places: RunFolders, given: Path, tmp_path: Path
) -> None:
    rows = 3
    lines = list(sampler.run(request(prime=Prime([given] * 4, rows, MAX_PIXELS)), tmp_path / "s"))
    tokens, scores = drawn(tmp_path / "s")
    dvae, prior = load_dvae(sampler.dvae_checkpoint), load_prior(sampler.prior_checkpoint)
    cut = torch.from_numpy(eval_crop(Image.open(given), 32).copy())[None]
    encoded = encode_images(dvae, cut, 0.1)[0].numpy()
    assert (tokens[:, :rows] == encoded[:rows]).all()
    assert len(np.unique(encoded[:rows])) > 1
    assert len(np.unique(tokens[:, rows:], axis=0)) == 4 * N
    recipe = sampler.prior_checkpoint.recipe()
    encoded = CaptionEncoder(sampler.tokenizer, recipe.tokenizer).encode(PROMPTS)
    text = prior.with_padding(*map(torch.from_numpy, encoded))
    flat = torch.from_numpy(tokens.astype(np.int64)).flatten(1)
    with torch.no_grad():
        logits = prior.image_logits(prior(text.repeat_interleave(N, 0), flat)).double()
    terms = logits.log_softmax(-1).gather(-1, flat[..., None])[..., 0]
    assert np.allclose(terms[:, rows * GRID :].sum(-1), scores, atol=1e-3)
    assert all((line["prime"], line["prime_rows"]) == (str(given), rows) for line in lines)
    # The picture is that of all tokens, given and drawn.
    with torch.no_grad():
        mu = dvae.decoder.decode_tokens(torch.from_numpy(tokens[:1].astype(np.int64)))[0]
    shown = ((mu.sigmoid() - 0.1) / 0.8).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(np.asarray(Image.open(lines[0]["png"])).astype(float) - shown).max() <= 1
    # Another batch, resumed.
    prime = request(2, prime=Prime([given] * 4, rows, MAX_PIXELS))
    run = sampler.run(prime, tmp_path / "t")
    next(run)
    run.close()
    assert pictures(list(sampler.run(prime, tmp_path / "t"))) == pictures(lines)


def test_a_picture_for_each_prompt(places: RunFolders, given: Path, call: Call, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (32, 32), (200, 30, 30)).save(other)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a", "prime": str(other)}) + "\n" + json.dumps({"prompt": "b"}) + "\n")
    command = ("sample", places.prior, "--captions", file, "--n", 1, "--prime-rows")
    both = call(*command, "0.5", "--prime", given)
    assert [(line["prime"], line["prime_rows"]) for line in both.lines] == [(str(other), 2), (str(given), 2)]
    again = call(*command, 2, "--prime", given)
    assert again.out == both.out  # 0.5 is 2 rows of 4: the same request
    one = call("sample", places.prior, "b", "--n", 1, "--prime", given, "--prime-rows", 2)
    assert set(pictures(one.lines).values()) < set(pictures(both.lines).values())
    assert call(*command, 3, "--prime", given).lines[0]["store"] != both.lines[0]["store"]
    assert "prompt 2: has no prime" in call(*command, 2).mistake()
    # The file's content decides, not its name.
    moved = tmp_path / "moved.png"
    moved.write_bytes(given.read_bytes())
    assert call(*command, 2, "--prime", moved).lines[0]["store"] == both.lines[0]["store"]
    moved.write_bytes(other.read_bytes())
    assert call(*command, 2, "--prime", moved).lines[0]["store"] != both.lines[0]["store"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--prime-rows", 2), "no picture is given"),
        (("--prime", "GIVEN"), "the number of given rows is missing"),
        (("--prime", "GIVEN", "--prime-rows", 0), "from 1 to 3"),
        (("--prime", "GIVEN", "--prime-rows", 4), "from 1 to 3"),
        (("--prime", "GIVEN", "--prime-rows", 1.5), "from 1 to 3"),
        (("--prime", "GIVEN", "--prime-rows", 0.01), "from 1 to 3"),
        (("--prime", "GIVEN", "--prime-rows", "half"), "--prime-rows half"),
        (("--prime", "missing.png", "--prime-rows", 2), "missing.png: cannot be read as a picture"),
        (("--prime", "TEXT", "--prime-rows", 2), "no image of a known format"),
    ],
)
def test_pictures_that_cannot_be_given(
    places: RunFolders, given: Path, call: Call, tmp_path: Path, arguments: tuple[object, ...], why: str
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    named = [{"GIVEN": given, "TEXT": text}.get(str(argument), argument) for argument in arguments]
    assert why in call("sample", places.prior, "a star", *named, "--out", tmp_path / "s").mistake()
    assert not (tmp_path / "s").exists()


# --- faults


def test_a_full_gpu_halves_the_batch(
    sampler: Sampler, whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def holds(most: int) -> Callable[..., Any]:
        def draw(decoder: Any, text_ids: Any, uniforms: Any, *arguments: Any, **more: Any) -> Any:
            if uniforms.shape[0] * uniforms.shape[1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return original(decoder, text_ids, uniforms, *arguments, **more)

        return draw

    original = pipeline.sample_images
    monkeypatch.setattr(pipeline, "sample_images", holds(2))
    assert pictures(list(sampler.run(request(8), tmp_path / "s"))) == pictures(whole)
    monkeypatch.setattr(pipeline, "sample_images", holds(0))
    with pytest.raises(UserError, match="batch-size"):
        list(sampler.run(request(8), tmp_path / "t"))


def test_a_disk_that_fills_up_loses_nothing(
    sampler: Sampler, whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.SampleStore.save

    def save(self: store.SampleStore, picture: np.ndarray, name: str) -> None:
        if name.startswith("00001-") and name.endswith("-00001.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, picture, name)

    monkeypatch.setattr(store.SampleStore, "save", save)
    lines: list[dict[str, Any]] = []
    with pytest.raises(UserError, match="No space left"):
        lines.extend(sampler.run(request(1), tmp_path / "s"))
    assert [(line["prompt_index"], line["index"]) for line in lines] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert zarr.open_group(str(tmp_path / "s" / STORE), mode="r").attrs["rows"] == 4
    monkeypatch.setattr(store.SampleStore, "save", original)
    assert pictures(list(sampler.run(request(), tmp_path / "s"))) == pictures(whole)


def test_a_temperature_that_would_overflow_is_refused(places: RunFolders, call: Call, tmp_path: Path) -> None:
    draw = ("sample", places.prior, "a star", "--n", 1)
    for temperature in ("1e-320", "0.0009"):
        refused = call(*draw, "--temperature", temperature, "--out", tmp_path / "s").mistake()
        assert "is above 0 and below 0.001; give 0, which takes the likeliest token" in refused
    assert not (tmp_path / "s").exists()
    for temperature in ("0", "0.001", "1e308"):
        assert call(*draw, "--temperature", temperature, "--out", tmp_path / temperature).code == 0


def test_pictures_that_are_gone_or_cut_short_are_drawn_again(
    places: RunFolders, whole: list[dict[str, Any]], call: Call, tmp_path: Path
) -> None:
    draw = ("sample", places.prior, *PROMPTS, "--n", N, "--seed", 7, "--out", tmp_path / "s")
    lines = call(*draw).lines
    gone, cut, zeros, empty = (Path(lines[row]["png"]) for row in (0, 4, 5, 11))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-20])
    zeros.write_bytes(bytes(zeros.stat().st_size))
    empty.write_bytes(b"")
    damaged = call("verify", tmp_path / "s")
    assert sum(f"{file}: " in damaged.out and "draw it again" in damaged.out for file in (gone, cut, zeros, empty)) == 4
    again = call(*draw)
    assert "4 pictures are missing or were cut short; they are drawn again" in again.err
    assert again.lines == lines
    assert pictures(lines) == pictures(whole)
    assert call("verify", tmp_path / "s").code == 0
    assert "drawn again" not in call(*draw).err


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_samples_of_fewer_bits_are_others(precision: str, places: RunFolders, call: Call, tmp_path: Path) -> None:
    full, less = tmp_path / "fp32", tmp_path / precision
    assert call("sample", places.prior, *PROMPTS, "--out", full).code == 0
    assert call("sample", places.prior, *PROMPTS, "--out", less, "--precision", precision).code == 0
    a, b = drawn(full), drawn(less)
    assert not np.array_equal(a[1], b[1])
    assert abs(a[1].mean() / b[1].mean() - 1) < 0.1
    refused = call("sample", places.prior, *PROMPTS, "--out", full, "--precision", precision).mistake()
    assert str(full) in refused


def test_8_bit_samples_resume_in_batches_of_any_size(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of more rows than INT8_ROWS is multiplied in another way, and draws the same."""
    monkeypatch.setattr(cpu_kernels, "INT8_ROWS", 4)

    def request_in(batch_size: int) -> SampleRequest:
        return SampleRequest(PROMPTS, SamplingSettings(n=N, batch_size=batch_size, precision="int8"), seed=7)

    alone = list(sampler.run(request_in(1), tmp_path / "alone"))
    run = sampler.run(request_in(2), tmp_path / "resumed")
    stopped = [next(run) for _ in range(3)]
    run.close()  # type: ignore[attr-defined]
    resumed = list(sampler.run(request_in(64), tmp_path / "resumed"))
    assert resumed[:3] == stopped
    assert pictures(resumed) == pictures(alone)


def test_processes_draw_what_one_thread_draws(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of several batches, or the rest of one that was stopped, is drawn by as many processes as threads."""
    alone = list(sampler.run(request(batch_size=2), tmp_path / "alone"))
    asked: list[tuple[int, int]] = []

    def counted(function: Any, blocks: list[range], workers: int, mend: str) -> Iterator[Any]:
        asked.append((len(blocks), workers))
        return map_blocks(function, blocks, workers, mend)

    monkeypatch.setattr(pipeline, "map_blocks", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    list(sampler.run(request(batch_size=12), tmp_path / "one batch"))
    assert asked == []
    stopped = sampler.run(request(batch_size=2), tmp_path / "several")
    begun = [line["png"] for line, _ in zip(stopped, range(3), strict=False)]
    stopped.close()  # type: ignore[attr-defined]
    several = list(sampler.run(request(batch_size=2), tmp_path / "several"))
    assert begun == [line["png"] for line in several[:3]]
    assert [workers for _, workers in asked] == [3, 3]
    assert asked[0][0] == 8  # batches of 2 and 1 of each of the 4 prompts
    assert asked[1][0] < 8
    for ours, theirs in zip(several, alone, strict=True):
        assert Path(ours["png"]).read_bytes() == Path(theirs["png"]).read_bytes()
        assert ours["log_likelihood"] == theirs["log_likelihood"]
    np.testing.assert_array_equal(drawn(tmp_path / "several")[0], drawn(tmp_path / "alone")[0])
