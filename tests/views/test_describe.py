from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.peak_memory import peak_bytes
from helpers.tiny_chain import HELD_OUT, ROWS, SAMPLES, SEEN, TinyChain, build_chain, write_recipe
from helpers.token_stores import write_tokens
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

from dalle_cli.app import app
from dalle_cli.config.layout import paper_layout
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.errors import UserError
from dalle_cli.prior.train import train_prior
from dalle_cli.stores import usable_rows
from dalle_cli.stores.files import sha256_file
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.views.describe import Description, describe
from dalle_cli.views.describe_recipe import format_layers
from dalle_cli.views.describe_run import RunDescription
from dalle_cli.views.tables import render


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    return build_chain(tmp_path_factory.mktemp("chain"))


def shown(found: Description) -> str:
    """Return the tables that ``dalle show`` prints."""
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render(found, console)
    return console.export_text()


def test_the_papers_largest_model_is_counted_without_its_memory(tmp_path: Path) -> None:
    recipe = tmp_path / "12b.yaml"
    recipe.write_text("name: 12b\nprior: {powersgd: {rank: 896}}\n")
    described: list[Description] = []
    assert peak_bytes(lambda: described.append(describe(recipe))) < 2**30  # the weights alone would take 48 GB
    found = described[0]
    prior, d, layers = found.prior, 3968, 64
    # Matrices of a layer: d x 3d, d x d, d x 4d, 4d x d. The rest of a layer: two norms' gain and bias (4d), biases of
    # 3d, d, 4d and d. Outside the layers: embeddings, the last norm, unembeddings with their biases.
    assert prior.parameters.effective == 12 * d**2 * layers == 12_092_178_432
    outside = (16384 + 256 + 256 + 8192 + 32 + 32) * d + 2 * d + (d + 1) * (16385 + 8192)
    assert prior.parameters.total == (12 * d**2 + 13 * d) * layers + outside
    assert prior.weight_bytes.total == 2 * 12 * d**2 * layers + 4 * (13 * d * layers + outside)
    assert prior.powersgd.compression == pytest.approx(0.86, abs=0.005)
    assert asdict(found.tokens) == {"text": 256, "image": 1024, "total": 1280}
    assert prior.attention == {"row": "1, 3-5, 7-9 ... 63", "column": "2, 6, 10 ... 62", "conv": "64"}
    assert prior.attention_of_each_layer == paper_layout(64)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
    text = shown(found)
    for expected in ("12.09e9", "256 text + 1024 image = 1280", "62 heads x 64 = 3968", "85.9%", "2, 6, 10 ... 62"):
        assert expected in text


@pytest.mark.parametrize(("rank", "d_model", "percent"), [(512, 1920, 83), (640, 2688, 85), (896, 3968, 86)])
def test_compression_is_the_papers_table(tmp_path: Path, rank: int, d_model: int, percent: int) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("")
    sizes = [f"prior.model.heads={d_model // 64}", f"prior.model.d_model={d_model}", f"prior.powersgd.rank={rank}"]
    found = describe(recipe, sizes).prior
    assert round(100 * found.powersgd.compression) == percent
    assert found.d_model == d_model


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([64], "64"),
        ([2, 6], "2, 6"),
        ([1, 2, 3], "1-3"),
        ([1, 3, 4], "1, 3-4"),
        ([2, 6, 10, 14], "2, 6, 10, 14"),
        ([2, 6, 10, 14, 18], "2, 6, 10 ... 18"),
        (list(range(1, 65)), "1-64"),
    ],
)
def test_layers_in_few_words(numbers: list[int], words: str) -> None:
    assert format_layers(numbers) == words


def test_a_token_store(chain: TinyChain) -> None:
    found = describe(chain.places.tokens)
    assert (found.what, found.rows, found.usable_rows, found.complete) == ("token store", ROWS, ROWS, True)
    assert found.source == chain.recipe.data.train
    assert found.tokenizer == describe(chain.places.tokenizer).sha256
    assert found.dvae == sha256_file(next(chain.places.dvae.glob("step-*")) / "ema.safetensors")
    assert found.arrays["image"].shape == [ROWS, 4, 4]
    assert found.arrays["image"].dtype == "uint16"
    group = zarr.open_group(str(chain.places.tokens), mode="r")
    for row, caption in enumerate(found.captions):
        assert caption.caption == group["caption"][row]
        assert caption.tokens == group["text_length"][row]
    assert len(found.captions) == 5
    on_disk = sum(file.stat().st_size for file in chain.places.tokens.rglob("c/*") if file.is_file())
    assert found.bytes >= on_disk > 0
    text = shown(found)
    assert "40 x 4 x 4" in text
    assert found.dvae in text
    assert found.captions[0].caption in text


def test_the_files_of_a_store_of_an_earlier_version_are_counted(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "t.zarr", 40, 8, 400, 4, 16)
    found = describe(path)
    group = zarr.open_group(str(path), mode="r+")
    text = {name: value for name, value in group.attrs["text"].items() if name != "bytes"}
    group.attrs.put({**group.attrs, "text": text})
    assert describe(path) == found


def test_an_unfinished_store_says_so_and_counts_what_was_skipped(tmp_path: Path) -> None:
    path = tmp_path / "t.zarr"
    empty = describe_new(path, rows=0)
    assert (empty.rows, empty.usable_rows, empty.complete, empty.captions) == (0, None, False, [])
    found = describe_new(path, rows=3)
    assert (found.rows, found.usable_rows, found.complete) == (3, None, False)
    assert found.skipped == {"text": {"empty caption": 2}}
    assert [c.tokens for c in found.captions] == [2, 0, 0]
    text = shown(found)
    assert "empty caption" in text
    assert "unfinished" in text
    assert "not begun" in text


def test_a_large_store_is_described_by_what_its_writers_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tokens(tmp_path / "t.zarr", 40, 8, 400, 4, 16)
    walked = describe(path)
    sizes = {name: sum(f.stat().st_size for f in (path / name).rglob("*") if f.is_file()) for name in walked.arrays}
    assert {name: array.bytes for name, array in walked.arrays.items()} == sizes
    monkeypatch.setattr(usable_rows, "LARGE", 40)
    assert describe(path).usable_rows is None
    assert "not counted until training starts" in shown(describe(path))
    usable_rows.usable_rows(TokenReader(path))
    read: list[object] = []
    monkeypatch.setattr(TokenReader, "usable_bits", lambda self: read.append(self))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: read.append(self))
    assert describe(path) == replace(walked, usable_rows=40)
    assert read == []


def describe_new(path: Path, rows: int) -> Description:
    """Describe a new store whose text part has one caption and otherwise skipped rows."""
    with PartWriter(path, "text", {"source": "s", "source_name": "s", "tokenizer": "t", "text_length": 4}, 3) as writer:
        if rows:
            length = np.array([2] + [0] * (rows - 1), np.uint16)
            arrays = {
                "text": np.zeros((rows, 4), np.uint16),
                "text_length": length,
                "caption": np.array(["x"] * rows, object),
            }
            keys = [str(i) for i in range(rows)]
            writer.append(keys, arrays, dict.fromkeys(keys[1:], "empty caption"))
    return describe(path)


@pytest.mark.parametrize("inner", ["one", "one/samples.zarr"])
def test_a_sample_store(chain: TinyChain, inner: str) -> None:
    found = describe(chain.places.samples / inner)
    assert found.what == "sample store"
    assert found.prompts == [SEEN, HELD_OUT]
    assert found.rows == found.committed == 2 * SAMPLES
    assert found.complete
    assert found.prior == describe(chain.places.prior).identity
    assert SEEN in shown(found)


@pytest.mark.parametrize("kind", ["dvae", "prior", "clip"])
def test_a_checkpoint_or_its_run(chain: TinyChain, kind: str) -> None:
    run = chain.places.root / kind
    step = next(run.glob("step-*"))
    found = describe(run)
    assert found == describe(step)
    assert (found.kind, found.step, found.updates, found.recipe) == (kind, 2, 2, "tiny")
    assert found.parameters == sum(tensor.size for tensor in load_file(step / "ema.safetensors").values())
    for name, file in found.files.items():
        assert file.bytes == (step / name).stat().st_size
        assert file.sha256 == (sha256_file(step / name) if name in ("ema.safetensors", "model.safetensors") else None)
    assert found.belongs == json.loads((step / "manifest.json").read_text())["belongs"]
    text = shown(found)
    assert found.identity in text
    assert "2 of 2 updates" in text


def test_counts_of_a_recipe_are_those_of_its_checkpoints(chain: TinyChain) -> None:
    recipe = describe(chain.recipe_file)
    assert recipe.prior.parameters.total == describe(chain.places.prior).parameters
    assert recipe.dvae.parameters.total == describe(chain.places.dvae).parameters
    assert recipe.name == "tiny"
    assert recipe.grid == 4


def test_a_tokenizer(chain: TinyChain) -> None:
    found = describe(chain.places.tokenizer)
    assert found == describe(chain.places.tokenizer / "tokenizer.json")
    assert found.what == "tokenizer"
    assert found.vocab_size == 300
    words = [text.strip() for text in found.examples.values()]
    assert "small" in words
    assert found.sha256 in shown(found)


def test_what_it_does_not_know_is_refused(chain: TinyChain, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w", zarr_format=3)
    for path in (tmp_path / "nowhere", tmp_path / "notes.txt", tmp_path, tmp_path / "other.zarr"):
        with pytest.raises(UserError, match="understands a recipe") as error:
            describe(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="--set"):
        describe(chain.places.tokens, ["seed=1"])


def test_a_damaged_checkpoint_is_told(chain: TinyChain, tmp_path: Path) -> None:
    step = tmp_path / "step-00000002"
    step.mkdir()
    for name in ("manifest.json", "recipe.yaml"):
        (step / name).write_bytes((next(chain.places.prior.glob("step-*")) / name).read_bytes())
    assert describe(step).files["ema.safetensors"].bytes is None
    assert "missing" in shown(describe(step))
    (step / "ema.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"ema\.safetensors: damaged"):
        describe(step)


def test_the_command_prints_json_or_tables(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    result = CliRunner().invoke(app, ["show", str(recipe), "--json", "--set", "seed=7"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["seed"] == 7
    assert found == asdict(describe(recipe, ["seed=7"]))
    plain = CliRunner().invoke(app, ["show", str(recipe)])
    assert plain.exit_code == 0
    assert "Recipe tiny" in plain.stdout
    assert "Prior" in plain.stdout


def test_samples_of_a_prior_that_was_trained_further_are_to_be_drawn_again(chain: TinyChain, tmp_path: Path) -> None:
    run = RunFolders(tmp_path / "run")
    shutil.copytree(chain.places.root, run.root)
    shutil.copy(run.ranked_lines, run.sample_lines)

    def drawn() -> dict[str, tuple[str, str]]:
        found = describe(run.root)
        assert isinstance(found, RunDescription)
        return {stage.command: (stage.state, stage.detail) for stage in found.stages[-3:]}

    done = {"sample": ("done", str(run.sample_lines)), "rerank": ("done", str(run.ranked_lines))}
    assert drawn() == {**done, "report": ("not run", "")}
    recipe = chain.recipe.model_copy(update={"run": str(run.root)})
    train_prior(recipe, run.tokens, run.prior, extend=1)
    earlier = ("unfinished", "of an earlier prior")
    assert drawn() == {"sample": earlier, "rerank": earlier, "report": ("not run", "")}


def test_a_run_s_folder_names_the_stages_and_the_next_one(chain: TinyChain, tmp_path: Path) -> None:
    found = describe(chain.places.root)
    assert isinstance(found, RunDescription)
    states = {stage.command: (stage.state, stage.detail) for stage in found.stages}
    assert states["encode-images"] == ("done", f"{ROWS} rows")
    assert states["train-prior"] == ("done", "update 2 of 2")
    assert states["rerank"] == ("done", str(chain.ranked))
    assert states["sample"] == ("not run", "")
    assert found.next == "sample"
    table = shown(found)
    assert "update 2 of 2" in table
    assert "dalle sample" in table
    command = CliRunner().invoke(app, ["show", str(chain.places.root)], env={"COLUMNS": "300"})
    root = chain.places.root
    assert f"dalle sample {root / 'prior'} --held-out --limit 50 > {root / 'samples.jsonl'}" in command.stdout
    (tmp_path / "prior").symlink_to(chain.places.prior)
    part = describe(tmp_path)
    assert isinstance(part, RunDescription)
    assert part.next == "train-tokenizer"
    with pytest.raises(UserError, match="is not an artifact of dalle"):
        describe(chain.places.samples)
    with pytest.raises(UserError, match=rf"is a folder of runs; name one of {chain.places.root}"):
        describe(chain.places.root.parent)
