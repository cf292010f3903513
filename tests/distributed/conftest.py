"""Fixtures of the tests that train a prior in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.sharded_runs import CLIP, make_inputs, train_alone


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and a token store; see ``make_inputs``."""
    return make_inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def alone(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that shards nothing."""
    return train_alone(made, tmp_path_factory.mktemp("alone") / "run", **CLIP)
