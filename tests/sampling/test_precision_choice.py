"""``sampling.precision: auto`` is settled once for a folder of samples, the same for one sample as for many."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from conftest import Call
from helpers.decoding import build
from helpers.running import smallest_recipe
from helpers.untrained import make_untrained

from dalle_cli import Pipeline
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe, SamplingSettings
from dalle_cli.prior.decode import Decoder
from dalle_cli.sampling import precision_choice
from dalle_cli.sampling.precision_choice import settle_precision, trial_row
from dalle_cli.sampling.request import SampleRequest
from dalle_cli.sampling.sampler import Sampler
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.samples import STORE
from dalle_cli.stores.shards import Shard
from dalle_cli.text.bpe import Tokenizer

PROMPTS, N = ["a red star", "a circle"], 3


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> RunFolders:
    folder = tmp_path_factory.mktemp("chain")
    recipe = smallest_recipe(folder, None)
    recipe["sampling"]["precision"] = "auto"
    return make_untrained(Recipe.model_validate(recipe), folder)


@pytest.fixture
def sampler(places: RunFolders) -> Sampler:
    return Sampler(open_checkpoint(places.prior), open_checkpoint(places.dvae), Tokenizer.load(places.tokenizer))


@pytest.fixture(autouse=True)
def faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes one precision the faster one, as if on another machine; nothing is measured yet."""
    machines = iter(range(100))

    def become(wanted: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine {next(machines)}"))
        monkeypatch.setattr(
            precision_choice,
            "trial_row",
            lambda prior, settings, precision: lambda: time.sleep(0 if precision == wanted else 0.005),
        )

    def never(*_: object) -> Callable[[], None]:
        raise AssertionError("nothing was to be measured")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(precision_choice, "trial_row", never)
    return become


def request(precision: Any = "auto", **other: Any) -> SampleRequest:
    return SampleRequest(PROMPTS, SamplingSettings(n=N, batch_size=1, precision=precision), seed=7, **other)


def recorded(folder: Path) -> str:
    return str(zarr.open_group(str(folder / STORE), mode="r").attrs["request"]["settings"]["precision"])


def pictures(lines: list[dict[str, Any]]) -> list[bytes]:
    return [Path(line["png"]).read_bytes() for line in lines]


@pytest.mark.parametrize(("wanted", "other"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_folder_keeps_the_precision_that_it_was_begun_in(
    wanted: str,
    other: str,
    sampler: Sampler,
    faster: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faster(wanted)
    run = sampler.run(request(), tmp_path / "s")
    first = next(run)
    run.close()
    log = capsys.readouterr().err
    assert f"sampling.precision: auto is {wanted}: a row of tokens takes" in log
    assert recorded(tmp_path / "s") == wanted
    faster(other)
    again = list(sampler.run(request(), tmp_path / "s"))
    assert f"sampling.precision: auto is {wanted}: as the samples have begun" in capsys.readouterr().err
    assert again[0] == first
    stated = list(sampler.run(request(wanted), tmp_path / "stated"))
    assert pictures(again) == pictures(stated)
    assert [line["log_likelihood"] for line in again] == [line["log_likelihood"] for line in stated]
    list(sampler.run(request(), tmp_path / "t"))
    assert recorded(tmp_path / "t") == other


def test_one_sample_is_drawn_in_the_precision_of_many(
    places: RunFolders, faster: Callable[[str], None], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice depends on the recipe's settings, so another number of samples is not measured anew."""
    faster("bf16")
    many = call("sample", places.prior, PROMPTS[0], "--n", N).lines
    assert recorded(Path(many[0]["store"]).parent) == "bf16"

    def never(*_: object) -> Callable[[], None]:
        raise AssertionError("nothing was to be measured")

    monkeypatch.setattr(precision_choice, "trial_row", never)
    (alone,) = call("sample", places.prior, PROMPTS[0], "--index", 1).lines
    assert Path(alone["png"]).read_bytes() == Path(many[1]["png"]).read_bytes()
    assert alone["log_likelihood"] == many[1]["log_likelihood"]
    shown = json.loads(call("show", Path(alone["store"]).parent, "--json").out)
    assert shown["settings"]["precision"] == "bf16"


def test_shares_take_fp32_without_measuring(
    sampler: Sampler, faster: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for i in (1, 2, 3) for line in sampler.run(request(shard=Shard(i, 3)), tmp_path / "s")]
    assert capsys.readouterr().err.count("auto is fp32: shares may be drawn on unlike machines") == 3
    assert pictures(lines) == pictures(list(sampler.run(request("fp32"), tmp_path / "whole")))
    stated = list(sampler.run(request("bf16", shard=Shard(1, 3)), tmp_path / "stated"))
    assert recorded(Path(stated[0]["store"]).parent) == "bf16"


def test_the_same_call_from_python_reads_what_it_drew(
    places: RunFolders, faster: Callable[[str], None], tmp_path: Path
) -> None:
    faster("bf16")
    pipeline = Pipeline.open(places.root)
    drawn = pipeline.sample(PROMPTS, n=N, seed=3)
    faster("fp32")
    assert [sample.path for sample in pipeline.sample(PROMPTS, n=N, seed=3)] == [sample.path for sample in drawn]
    assert recorded(drawn[0].path.parent) == "bf16"
    full = pipeline.sample(PROMPTS, n=N, seed=3, precision="fp32")
    assert [a.log_likelihood for a in full] != [b.log_likelihood for b in drawn]


@pytest.mark.parametrize(
    ("kind", "lacking", "wanted"), [("cuda", False, "bf16"), ("cuda", True, "fp32"), ("mps", True, "fp32")]
)
def test_gpus_are_not_measured(
    kind: str, lacking: bool, wanted: str, sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_choice, "choose_device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not lacking)
    settled = settle_precision(request(), sampler.prior_checkpoint, tmp_path / "s")
    assert settled == request(wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("settings", "shape"),
    [({"n": 512}, (1, 16)), ({"n": 3, "guidance": 3.0}, (2, 3)), ({"n": 512, "batch_size": 4}, (1, 4))],
)
def test_a_trial_makes_the_steps_of_a_row(
    precision: Any, settings: dict[str, Any], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, step = [], Decoder.step

    def counted(decoder: Decoder, cache: Any, position: int, token: torch.Tensor) -> torch.Tensor:
        logits = step(decoder, cache, position, token)
        made.append((position, tuple(token.shape), decoder.dtype, bool(logits.isfinite().all())))
        return logits

    monkeypatch.setattr(Decoder, "step", counted)
    trial_row(build("paper", 4, 3, 3).requires_grad_(False), SamplingSettings(**settings), precision)()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert made == [(position, shape, dtype, True) for position in range(8, 12)]
