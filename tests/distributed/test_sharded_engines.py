"""FSDP and DeepSpeed in the same tests: runs on two gloo ranks against one process, and against each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Call
from helpers.sharded_runs import (
    CLIP,
    HALF,
    assert_same_bytes,
    assert_same_run,
    command,
    run_all,
)

from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.tensor_files import TensorFiles

pytestmark = pytest.mark.timeout(900)  # the runs are made before the first test
ENGINES = ["fsdp", "deepspeed"] if sys.platform == "linux" else ["fsdp"]
MICRO, BEGUN = {"training.micro_batch": 2}, {"training.updates": HALF}
CASES: dict[str, dict[str, Any]] = {
    "zero 1": {"sharding.zero": 1, **MICRO},
    "zero 2": {"sharding.zero": 2, **MICRO},
    "zero 3": {"sharding.zero": 3, **MICRO},
    "recomputed": {"sharding.zero": 3, "model.checkpoint_resblocks": True},
    "two nodes": {"sharding.zero": 3, "sharding.node_size": 1},
}
"""Settings of runs on two ranks, each of two micro-batches of 2 or one of 4."""


@pytest.fixture(scope="module")
def together(made: tuple[Path, Path], alone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each engine's runs: one of each case, and those that resume."""
    roots = {}
    begun = open_checkpoint(alone / f"step-{HALF:08d}").path
    for engine in ENGINES:
        root = roots[engine] = tmp_path_factory.mktemp(engine)
        (root / "one then two").mkdir()
        (root / "one then two" / begun.name).symlink_to(begun)
        runs = [
            *CASES.items(),
            ("in parts", {**CASES["zero 3"], **BEGUN}),
            ("in parts", CASES["zero 3"]),
            ("one then two", {"sharding.zero": 2}),
            ("two then one", {"sharding.zero": 3, **BEGUN}),
            ("three then one", {"sharding.zero": 3, **BEGUN}),
            ("three then one", {"sharding.zero": 1}),
        ]
        said = run_all(made, root, [(name, {"sharding.engine": engine, **CLIP, **more}) for name, more in runs])
        assert "resumes with prior.sharding.zero = 1, was 3" in said
    return roots


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_process(engine: str, case: str, alone: Path, together: dict[str, Path]) -> None:
    assert_same_run(together[engine] / case, alone)


@pytest.mark.skipif(len(ENGINES) == 1, reason="DeepSpeed is for Linux")
@pytest.mark.parametrize("case", CASES)
def test_the_engines_equal_each_other(case: str, together: dict[str, Path]) -> None:
    assert_same_run(together["deepspeed"] / case, together["fsdp"] / case)


@pytest.mark.parametrize("engine", ENGINES)
def test_clipping_was_triggered(engine: str, together: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (together[engine] / "zero 2" / "metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert norms
    assert min(norms) > CLIP["adam.clip_norm"]
    assert {line["skipped_updates"] for line in lines if "skipped_updates" in line} <= {0.0}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_with_the_same_bytes(engine: str, together: dict[str, Path]) -> None:
    assert_same_bytes(together[engine] / "in parts", together[engine] / "zero 3")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_resumes_on_other_ranks_and_stages(
    engine: str, made: tuple[Path, Path], alone: Path, together: dict[str, Path], call: Call
) -> None:
    root = together[engine]
    assert_same_run(root / "three then one", alone)
    begun = sum(json.loads(line)["step"] <= HALF for line in (alone / "metrics.jsonl").read_text().splitlines())
    assert_same_run(root / "one then two", alone, first=begun)
    done = call(*command(made, root / "two then one", CLIP))
    assert done.code == 0
    assert "resumes with prior.sharding.zero = 0, was 3" in done.err
    assert_same_run(root / "two then one", alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_rank_of_the_first_node_writes_its_own_file(engine: str, together: dict[str, Path]) -> None:
    found = open_checkpoint(together[engine] / "zero 3")
    names = sorted(path.name for path in found.path.iterdir() if path.is_file())
    assert names == [
        "ema-00001-of-00002.safetensors", "ema-00002-of-00002.safetensors", "ema.index.json", "manifest.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.index.json", "recipe.yaml",
    ]  # fmt: skip
    whole = sum(tensor.nbytes for tensor in found.tensors("raw").values())
    sizes = [file.stat().st_size for file in TensorFiles(found.path, "model").files()]
    assert max(sizes) < 0.7 * whole
    assert found.identity
    two = open_checkpoint(together[engine] / "two nodes")
    assert [file.name for file in TensorFiles(two.path, "model").files()] == ["model-00001-of-00001.safetensors"]
