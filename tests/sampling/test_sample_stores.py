"""Stores of samples: of the version before, of many prompts, and with prompts that are not those that were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import Call
from helpers.power_cuts import Disk
from helpers.running import smallest_recipe
from helpers.untrained import make_untrained

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe, SamplingSettings
from dalle_cli.errors import Damaged
from dalle_cli.sampling.request import SampleRequest
from dalle_cli.sampling.sampler import Sampler
from dalle_cli.stores import samples
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.samples import STORE, SampleStore
from dalle_cli.stores.scores import store_lines
from dalle_cli.text.bpe import Tokenizer

PROMPTS = ["a red star", "a circle", "two stars", "a blue star", "a cross"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> RunFolders:
    root = tmp_path_factory.mktemp("chain")
    return make_untrained(Recipe.model_validate(smallest_recipe(root, None)), root)


@pytest.mark.parametrize("in_folders", [False, True])
def test_samples_are_on_the_disk_before_they_are_committed_and_their_lines_come_later(
    places: RunFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_folders: bool
) -> None:
    monkeypatch.setattr(samples, "PROMPTS_A_FOLDER", 2 if in_folders else 100)
    monkeypatch.setattr(samples, "CHUNK", 4)
    disk, out, committed, real = Disk(monkeypatch), tmp_path / "out", list[int](), samples.write_attributes

    def commit(group: Path, attributes: dict[str, Any]) -> None:
        assert disk.lacks(out) == []
        assert len(list(out.rglob("*.png"))) >= attributes["rows"]
        committed.append(attributes["rows"])
        real(group, attributes)

    monkeypatch.setattr(samples, "write_attributes", commit)
    request = SampleRequest(PROMPTS, SamplingSettings(n=2, batch_size=3), seed=7)
    sampler = Sampler(open_checkpoint(places.prior), open_checkpoint(places.dvae), Tokenizer.load(places.tokenizer))
    number = 0
    for number, line in enumerate(sampler.run(request, out), start=1):
        assert Path(line["png"]).is_file()
        assert committed[-1] >= number
    assert number == committed[-1] == 10
    assert len(committed) > 2
    assert disk.lacks(out) == []
    lost = sorted(out.rglob("*.png"))[3]
    lost.unlink()
    assert len(list(sampler.run(request, out))) == 10
    assert lost.is_file()
    assert disk.lacks(out) == []


def as_version_2(out: Path) -> None:
    """Rewrite a store as the version before wrote it: with its prompts in the attributes."""
    group: Any = zarr.open_group(str(out / STORE), mode="a", zarr_format=3)
    attributes = dict(group.attrs)
    request = {**attributes["request"], "prompts": [str(prompt) for prompt in group["prompts"][:]]}
    del request["prompts_sha256"]
    group.attrs.put({**attributes, "version": 2, "request": request})
    shutil.rmtree(out / STORE / "prompts")
    (out / "checksums.json").unlink(missing_ok=True)


def test_a_store_of_the_version_before_is_read_and_gone_on_with(call: Call, places: RunFolders, tmp_path: Path) -> None:
    draw = ("sample", places.prior, *PROMPTS, "--n", 2, "--batch-size", 1)
    whole = call(*draw, "--out", tmp_path / "whole")
    call(*draw, "--out", tmp_path / "old")
    as_version_2(tmp_path / "old")
    assert [line["png"] for line in store_lines(tmp_path / "old" / STORE)] == [
        line["png"].replace("whole", "old") for line in whole.lines
    ]
    group: Any = zarr.open_group(str(tmp_path / "old" / STORE), mode="a", zarr_format=3)
    group.attrs["rows"] = 3
    for name in ("old", "whole"):
        again = call(*draw, "--out", tmp_path / name)
        assert again.code == 0, again.err
        assert [line["log_likelihood"] for line in again.lines] == [line["log_likelihood"] for line in whole.lines]
    assert call("verify", tmp_path / "old").code == 0
    assert "holds samples of other prompts" in call(*draw, "--out", tmp_path / "old", "--seed", 9).mistake()


def test_pictures_of_many_prompts_lie_in_folders(
    call: Call, places: RunFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = call("sample", places.prior, *PROMPTS, "--n", 1, "--out", tmp_path / "flat")
    monkeypatch.setattr(samples, "PROMPTS_A_FOLDER", 2)
    done = call("sample", places.prior, *PROMPTS, "--n", 1, "--out", tmp_path / "many")
    names = [Path(line["png"]).relative_to(tmp_path / "many").as_posix() for line in done.lines]
    assert names == [
        "00000000/00000-a_red_star-00000.png", "00000000/00001-a_circle-00000.png",
        "00000002/00002-two_stars-00000.png", "00000002/00003-a_blue_star-00000.png",
        "00000004/00004-a_cross-00000.png",
    ]  # fmt: skip
    assert [Path(line["png"]).read_bytes() for line in done.lines] == [
        Path(line["png"]).read_bytes() for line in flat.lines
    ]
    assert [line["png"] for line in store_lines(tmp_path / "many" / STORE)] == [line["png"] for line in done.lines]
    assert call("verify", tmp_path / "many").code == 0


def test_other_prompts_than_were_written_are_damage(call: Call, places: RunFolders, tmp_path: Path) -> None:
    call("sample", places.prior, *PROMPTS, "--n", 1, "--out", tmp_path / "s")
    group: Any = zarr.open_group(str(tmp_path / "s" / STORE), mode="a", zarr_format=3)
    group["prompts"][1] = "a square"
    with pytest.raises(Damaged, match=r"prompts: holds other prompts than were written"):
        store_lines(tmp_path / "s" / STORE)
    assert "prompts: holds other prompts" in call("verify", tmp_path / "s").out


def test_samples_whose_tokens_are_all_zero_are_whole(tmp_path: Path, call: Call) -> None:
    """A dVAE may use one code alone; zarr makes no files of zeros unless told to, and a missing file is damage."""
    identity = {"prior": "p", "prompts": ["a star"], "seed": 0, "settings": {"n": 2}}
    zeros, names = np.zeros((2, 8, 8, 3), np.uint8), [samples.png_name(0, index, "a star") for index in range(2)]
    with SampleStore(tmp_path / "s", identity, 2, 4, tmp_path / "run") as store:
        for row in range(2):
            one = slice(row, row + 1)
            store.add(row, np.zeros((1, 4, 4), np.uint16), np.zeros(1), zeros[one], names[one]).result()
    verified = call("verify", tmp_path / "s")
    assert verified.code == 0, verified.out


def test_a_batch_writes_no_prompts(tmp_path: Path) -> None:
    """A commit writes the attributes anew, so that they must not grow with the number of prompts."""
    prompts = [f"picture number {number}" for number in range(20_000)]
    identity = {"prior": "p", "prompts": prompts, "seed": 0, "settings": {"n": 1}}
    store = SampleStore(tmp_path / "s", identity, len(prompts), 4, tmp_path / "run")
    picture = np.zeros((1, 8, 8, 3), np.uint8)
    with store:
        store.add(0, np.zeros((1, 4, 4), np.uint16), np.zeros(1), picture, ["00000000/0.png"]).result()
    assert (tmp_path / "s" / "00000000" / "0.png").is_file()
    attributes = json.loads((tmp_path / "s" / STORE / "zarr.json").read_text())["attributes"]
    assert attributes["rows"] == 1
    assert len(json.dumps(attributes)) < 1000
    assert SampleStore(tmp_path / "s", identity, len(prompts), 4, tmp_path / "run").committed == 1
