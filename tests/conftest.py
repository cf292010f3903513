"""Fixtures for tests of commands: a chain made stage by stage, and a quick way to run a command."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable

import pytest
from helpers.running import ENVIRONMENT, Chain, Done, run, smallest_recipe, write_recipe
from hypothesis import HealthCheck, settings

from dalle_cli.app import run_arguments

# Set for the commands that tests start, too: no test reads or leaves anything in the user's own cache.
os.environ["XDG_CACHE_HOME"] = ENVIRONMENT["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dalle-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Shared by pytest's workers, since DeepSpeed's Adam takes minutes to compile.
    os.environ["TORCH_EXTENSIONS_DIR"] = ENVIRONMENT["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="dalle-tests-")
    atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)
# Set before torch is imported: with tiny tensors, many threads mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# An example's time says more about the machine's other work than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

Call = Callable[..., Done]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in this process, which saves importing torch; raise errors that are no user's mistake."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["dalle", *map(str, arguments)])
        capsys.readouterr()
        try:
            run_arguments()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        found = capsys.readouterr()
        return Done(code, found.out, found.err)

    return call


@pytest.fixture(scope="session")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Run every stage as a command of its own, with plain files between them."""
    root = tmp_path_factory.mktemp("by-hand")
    chain = Chain(root, write_recipe(root, smallest_recipe(root / "unused", None)))
    recipe, data = chain.recipe, ("--data", chain.train)
    commands: dict[str, tuple[object, ...]] = {
        "make-shapes": (root / "shapes", "--n", 48, "--test-n", 4, "--size", 32),
        "train-tokenizer": (recipe, *data, "--out", chain.tokenizer),
        "tokenize-text": (recipe, *data, "--tokenizer", chain.tokenizer, "--tokens", chain.tokens),
        "train-dvae": (recipe, *data, "--out", chain.dvae),
        "encode-images": (recipe, *data, "--dvae", chain.dvae, "--tokens", chain.tokens),
        "train-prior": (recipe, "--tokens", chain.tokens, "--out", chain.prior),
        "train-clip": (recipe, *data, "--tokens", chain.tokens, "--out", chain.clip),
    }
    for name, arguments in commands.items():
        done = run(name, *arguments)
        assert done.code == 0, f"{name}: {done.err}"
        chain.stages[name] = done
    return chain
