"""scripts/bench/quality unpacks data, keeps to its budget, and judges what it should."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.running import Chain as ChainOutputs
from helpers.running import smallest_recipe, write_recipe
from helpers.scorers import ColourScorer
from helpers.tiny_network import write_tiny_network
from PIL import Image
from quality_parts import judges, retrieval
from quality_parts.__main__ import score_shapes
from quality_parts.chain import Chain
from quality_parts.datasets import DataSet, unpack
from quality_parts.dense import Dense, beside_our_prior
from quality_parts.judges import Right, fit_head
from quality_parts.report import render
from quality_parts.retrieval import share_found, train_judge

from dalle_cli.data.open_source import open_source
from dalle_cli.errors import UserError
from dalle_cli.shapes.scene import FREE
from dalle_cli.shapes.world import make_shapes
from dalle_cli.stores.tokens import TokenReader

COLOURS = {"tomato": (200, 30, 20), "pea": (30, 180, 40), "plum": (90, 20, 130)}


def write_grocery(folder: Path, each: int) -> Path:
    """Write a data set with the columns of the grocery photographs: flat pictures of three kinds."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        rows = []
        for kind, colour in COLOURS.items():
            for i in range(each):
                file = io.BytesIO()
                pixels = np.clip(np.array(colour) + rng.integers(-9, 9, (40, 40, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
                picture = {"bytes": file.getvalue(), "path": f"{split}-{kind}-{i}.png"}
                captions = [f"a photo of a {kind}", f"{kind}, fruit"]
                rows.append({"image": picture, "captions": captions, "class": f"{kind} {i % 2}", "coarse": kind})
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    root = tmp_path_factory.mktemp("quality")
    return unpack("grocery", write_grocery(root / "source", 8), root / "grocery")


def test_a_data_set_is_unpacked_into_two_parts(data: DataSet, tmp_path: Path) -> None:
    train, held_out = (open_source(str(part)) for part in (data.train, data.held_out))
    assert (len(train), len(held_out)) == (24, 48)
    assert sorted(train.captions(0)) == ["a photo of a tomato", "tomato, fruit"]
    rows = data.rows(data.held_out)
    assert rows[0]["labels"] == {"kind": "tomato", "product": "tomato 0"}
    keys = {row["key"] for row in rows}
    assert not keys & {row["key"] for row in data.rows(data.train)}
    with pytest.raises(UserError, match="give the data set's place with --source"):
        unpack("grocery", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="choose grocery"):
        unpack("cats", tmp_path, tmp_path / "out")


def test_the_shapes_world_is_judged_by_its_oracle(tmp_path: Path) -> None:
    make_shapes(tmp_path / "world", n=3, test_n=4, seed=0, kind=FREE)
    data = unpack("shapes", tmp_path / "world", tmp_path / "shapes")
    assert len(data.rows(data.train)) == 3
    rows = data.rows(data.held_out)
    captions = [{**row, "caption": row["captions"][0]} for row in rows]
    real = [data.root / row["path"] for row in rows]
    other = [*real[1:], real[0]]
    ranked = [
        [{"png": str(wrong), "index": 0}, {"png": str(right), "index": 1}]
        for right, wrong in zip(real, other, strict=True)
    ]
    found = score_shapes(captions, {"real": real, "rebuilt": real, "ranked": ranked})
    assert set(found) == {"scene, seen pairs", "scene, held-out pairs"}
    for group in found.values():
        shares = {name: right["share"] for name, right in group.items()}
        assert shares == {"real": 1.0, "rebuilt": 1.0, "single": 0.0, "best": 0.0, "any": 1.0, "mean": 0.5}
    assert score_shapes([{"caption": "a tomato"}], {}) == {}


def test_the_head_learns_what_the_features_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 20, generator=generator)
    labels = torch.arange(200) % 4
    features = centres[labels] + 0.1 * torch.randn(200, 20, generator=generator)
    names = [f"class {label}" for label in labels.tolist()]
    head = fit_head(features[:100], names[:100])
    assert head.predict(features[100:]) == names[100:]
    right = Right.of([True, True, True, False])
    assert (right.share, right.n) == (0.75, 4)
    assert right.error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_distances_of_equal_sets_are_none() -> None:
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    same, other = judges.distances(rows, rows), judges.distances(rows + 3, rows)
    assert same["fid"] == pytest.approx(0, abs=1e-3)
    assert other["fid"] == pytest.approx(72, rel=0.02)  # 8 features, each 3 away
    assert (same["precision"], other["recall"]) == (1.0, 0.0)


@pytest.mark.slow
def test_a_chain_keeps_to_its_budget(data: DataSet, tmp_path: Path) -> None:
    """Updates follow from the speed of a trial run, and the dVAE's schedules are stretched alike."""
    recipe = smallest_recipe(tmp_path / "unused", data.train)
    for stage in ("dvae", "prior", "clip"):
        recipe[stage]["training"] |= {"updates": 40, "batch_size": 2}
    recipe["dvae"]["objective"] = {"temperature": {"start": 1.0, "end": 0.5, "updates": 30}}
    run = tmp_path / "run"
    chain = Chain(write_recipe(tmp_path, recipe), data, run, 3, [])
    chain.train(0.2)
    settings = dict(change.split("=") for change in chain.changes)
    assert int(settings["dvae.training.updates"]) >= 100
    assert int(settings["dvae.objective.temperature.updates"]) == round(int(settings["dvae.training.updates"]) * 0.75)
    made = [json.loads(path.read_text())["kind"] for path in run.glob("*/step-*/manifest.json")]
    assert {"dvae", "prior", "clip"} <= set(made)
    assert set(chain.seconds) == {
        "train-tokenizer", "tokenize-text", "train-dvae", "encode-images", "train-prior", "train-clip",
    }  # fmt: skip
    again = Chain(chain.recipe, data, run, 3, [])
    again.train(0.2)
    assert again.seconds == chain.seconds


def test_the_table_has_every_kind_of_pictures() -> None:
    share = {"share": 0.5, "error": 0.05, "n": 100}
    result: dict[str, Any] = {
        "system": "dalle", "data": "grocery", "minutes": 45.0, "seed": 0, "n": 32, "command": "scripts/bench/quality x",
        "machine": {"cores": 2, "gflops": 137, "torch": "2.14.1"}, "seconds": {"train-dvae": 120.0}, "psnr": 20.0,
        "right": {"kind": dict.fromkeys(("real", "rebuilt", "single", "best", "any", "commonest"), share)},
        "found": {"rebuilt": share}, "found_in_5": {"rebuilt": share},
        "distances": {"rebuilt": {"fid": 12.0, "kid": 0.002, "precision": 0.5, "recall": None}},
    }  # fmt: skip
    table = render([result])
    assert "## dalle on grocery, 45 minutes, seed 0" in table
    assert "2 cores at 137 GFLOP/s" in table
    assert table.count("0.500 ± 0.050") == 8
    assert "| reconstructions | 12.0 | 2.00 | 0.50 | - | 0.500 ± 0.050 | 0.500 ± 0.050 |" in table


def test_the_dense_transformer_is_causal_and_trains_beside_ours(by_hand: ChainOutputs, tmp_path: Path) -> None:
    model = Dense(16, 2, 2, text_length=3, image_length=6, text_vocab=10, codes=5).eval()
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randint(10, (2, 3), generator=generator), torch.randint(5, (2, 6), generator=generator)
    logits = model(text, image[:, :-1])
    assert logits.shape == (2, 6, 5)
    changed = image.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 5
    difference = (model(text, changed[:, :-1]) - logits).abs().amax(dim=(0, 2))
    assert difference[:4].max() == 0
    assert difference[4] > 0
    for name in ("prior", "tokens.zarr"):
        (tmp_path / name).symlink_to(by_hand.root / "made" / name)
    found = beside_our_prior(tmp_path, 1.0, 0)
    assert found["updates"] > 5
    assert 0 < found["image_loss"] < 2 * np.log(16)


def test_the_judge_of_captions_sees_only_pictures_that_are_not_drawn(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_network(tmp_path / "network")
    monkeypatch.setattr(retrieval, "NETWORK", str(tmp_path / "network"))
    recipe = smallest_recipe(tmp_path / "unused", None)
    recipe["clip"]["training"] |= {"batch_size": 8}
    drawn = data.rows(data.held_out)[:9]
    judge = train_judge(data, write_recipe(tmp_path, recipe), drawn)
    store = TokenReader(data.root / "judge-9" / "tokens.zarr")
    keys = set(store.strings("key", np.arange(len(store))))
    assert len(keys) == 48 - 9
    assert not keys & {row["key"] for row in drawn}
    rows = [row for row in data.rows(data.held_out) if row["key"] in keys][::6]
    files, captions = [data.root / row["path"] for row in rows], [row["captions"][0] for row in rows]
    assert share_found(judge, files, captions).share > 0.6  # of three kinds


def test_found_captions_are_those_that_fit_best(tmp_path: Path) -> None:
    files = []
    for name, pixel in {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}.items():
        files.append(tmp_path / f"{name}.png")
        Image.new("RGB", (16, 16), pixel).save(files[-1])
    assert share_found(ColourScorer(), files, ["red", "green", "blue"]).share == 1.0
    assert share_found(ColourScorer(), files, ["red", "blue", "blue"]).share == pytest.approx(2 / 3)
    assert share_found(ColourScorer(), files, ["red", "blue", "blue"], among=2).share == 1.0
