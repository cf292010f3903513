"""Whatever the JSON in a run's files says, what reads it works or ends with one line: no traceback, crash or hang."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.running import run
from helpers.tiny_chain import TinyChain, build_chain
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.clip.scoring import load_scorer
from dalle_cli.config.load import load_recipe
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.model import load_prior
from dalle_cli.prior.train import train_prior
from dalle_cli.stores.checkpoint import manifest_checksum, open_checkpoint
from dalle_cli.stores.checksums import CHECKSUMS
from dalle_cli.stores.files import json_text, sha256_file
from dalle_cli.stores.scores import sample_stores, store_lines
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import usable_rows
from dalle_cli.stores.verify import verify
from dalle_cli.views.describe import describe

DEEP = "\ud7ff deep"
"""Stands for 100,000 nested lists, which no JSON library writes."""
HOSTILE = (
    *(None, True, "", "x", "\x1b[2J", "a" * 64, DEEP, -1, 0, 7, 2**70, 1e308, math.nan, math.inf),
    *([], [[]], ["x"], [1, 2, 3], {}, {"x": 1}),
)
EXAMPLES = 120


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    chain = build_chain(tmp_path_factory.mktemp("chain"))
    assert run("rerank", "--clip", chain.places.clip, stdin=chain.ranked.read_text()).code == 0
    return chain


def json_files(root: Path) -> list[Path]:
    found = [path for path in root.rglob("*.json") if path.name != CHECKSUMS]
    return sorted(path for path in found if not path.name.startswith("."))


def replaced(value: Any, draw: Callable[[Any], Any]) -> Any:
    """Return a JSON value with one part of it replaced by something hostile, or left out."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 9)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        changed = value.copy()
        if draw(st.integers(0, 9)):
            changed[key] = replaced(value[key], draw)
        else:
            del changed[key]
        return changed
    return draw(st.sampled_from(HOSTILE))


def write(file: Path, value: Any) -> None:
    file.write_text(json_text(value).replace(json.dumps(DEEP, ensure_ascii=False), "[" * 100_000 + "]" * 100_000))


def sign_again(root: Path, changed: Path) -> None:
    """Make all checksums right, as a program would that wrote the changed file."""
    for manifest in root.rglob("manifest.json"):
        content = json.loads(manifest.read_text()) if manifest != changed else None
        if isinstance(content, dict):
            for name in content["others"]:
                content["others"][name] = sha256_file(manifest.parent / name)
            manifest.write_text(json_text({**content, "checksum": manifest_checksum(content)}))
    for checksums in root.rglob(CHECKSUMS):
        names = json.loads(checksums.read_text())
        checksums.write_text(json_text({name: sha256_file(checksums.parent / name) for name in names}))


def read_everything(chain: TinyChain) -> None:
    """Read a run as commands do; every mistake must be a UserError."""
    places = chain.places

    def rows() -> None:
        reader = TokenReader(places.tokens)
        reader.require_complete()
        for name in ("text", "text_length", "image", "image_ok"):
            reader.read(name, np.arange(len(reader)))
        usable_rows(reader)
        reader.strings("caption", range(len(reader)))

    readers: list[Callable[[], object]] = [
        rows,
        lambda: verify(places.root),
        lambda: load_prior(open_checkpoint(places.prior)),
        lambda: load_dvae(open_checkpoint(places.dvae)),
        lambda: load_scorer(str(places.clip), None, None, beside=places.clip),
        lambda: [line for store in sample_stores(places.samples) for line in store_lines(store)],
        *(lambda path=path: describe(path) for path in (places.root, places.tokens, places.prior, places.tokenizer)),
        lambda: describe(sample_stores(places.samples / "one")[0]),
        lambda: train_prior(chain.recipe, places.tokens, places.prior),
    ]
    for read in readers:
        with suppress(UserError):
            read()


@settings(max_examples=EXAMPLES, derandomize=True)
@given(data=st.data())
def test_no_json_of_a_run_ends_in_a_traceback(chain: TinyChain, data: st.DataObject) -> None:
    root = chain.places.root
    signed = [*root.rglob("manifest.json"), *root.rglob(CHECKSUMS)]
    file = data.draw(st.sampled_from(json_files(root)).map(lambda path: path.relative_to(root)))
    whole = {path: path.read_bytes() for path in {*signed, root / file}}
    value = replaced(json.loads(whole[root / file]), data.draw)
    try:
        if file.name == "manifest.json" and isinstance(value, dict):
            value["checksum"] = manifest_checksum(value)
        write(root / file, value)
        sign_again(root, root / file)
        read_everything(chain)
    finally:
        for path, content in whole.items():
            path.write_bytes(content)


def test_an_unchanged_run_is_read(chain: TinyChain) -> None:
    """Show that the test above does not pass because of its own mistakes."""
    assert verify(chain.places.root).damage == []
    signed = {path: path.read_bytes() for path in chain.places.root.rglob(CHECKSUMS)}
    sign_again(chain.places.root, chain.places.root)
    assert {path: path.read_bytes() for path in signed} == signed
    read_everything(chain)
    assert load_recipe(chain.recipe_file) == chain.recipe
