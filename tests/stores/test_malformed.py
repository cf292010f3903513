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
from dalle_cli.fid.figures import FORMAT, VERSION
from dalle_cli.prior.model import load_prior
from dalle_cli.prior.train import train_prior
from dalle_cli.report.report import write_report
from dalle_cli.stores.checkpoint import manifest_checksum, open_checkpoint
from dalle_cli.stores.checksums import CHECKSUMS
from dalle_cli.stores.files import encoded, json_text, sha256_file
from dalle_cli.stores.provenance import record_command
from dalle_cli.stores.scores import sample_stores, store_lines
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import usable_rows
from dalle_cli.stores.verify import verify
from dalle_cli.views.describe import describe

DEEP = "\ud7ff deep"
"""Stands for 100,000 nested lists, which no JSON library writes."""
HOSTILE = (
    *(None, True, "", "x", "\x1b[2J", "a" * 64, "a\0b", "\ud800", DEEP),
    *(-1, 0, 7, 2**70, 1e308, math.nan, math.inf),
    *([], [[]], ["x"], [1, 2, 3], {}, {"x": 1}),
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    chain = build_chain(tmp_path_factory.mktemp("chain"))
    assert run("rerank", "--clip", chain.places.clip, stdin=chain.ranked.read_text()).code == 0
    record_command(chain.places.tokens)
    share = {"value": 0.5, "prompts": 2}
    accuracy = {"prompts": 2, "samples": 4, "pool_size": 2, "best": share, "single": None, "any_right": share}
    figures = {"fid": 1.0, "kid_mean": 0.1, "kid_subset_size": 3, "kid_subsets": 4, "n_generated": 5, "n_reference": 6}
    system = {"name": "s", "generated": "g", "feature_dimensions": 3, **figures, "blur": [], "pool": []}
    system["accuracy"] = {"seen pairs": {**accuracy, "by_pool_size": {"1": share, "2": share}}}
    head = {"format": FORMAT, "version": VERSION, "command": "c", "reference": "r", "size": 32, "features": "clip f"}
    fid = {**head, "score_name": "clip_is", "systems": [system]}
    (chain.places.root / "fid.json").write_text(json_text(fid))
    return chain


def json_files(root: Path) -> list[Path]:
    """Return the files of a run that hold JSON, or objects of JSON in lines."""
    found = [path for ending in ("json", "jsonl") for path in root.rglob(f"*.{ending}") if path.name != CHECKSUMS]
    return sorted(path for path in found if not path.name.startswith("."))


def content_of(file: Path) -> Any:
    return json.loads(file.read_text()) if file.suffix == ".json" else list(map(json.loads, file.open()))


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
    if file.suffix == ".jsonl" and isinstance(value, list):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in value)
    else:
        text = json_text(value)
    file.write_bytes(encoded(text.replace(json.dumps(DEEP, ensure_ascii=False), "[" * 100_000 + "]" * 100_000)))


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


def report_everything(chain: TinyChain) -> None:
    root = chain.places.root
    with suppress(UserError):
        write_report(chain.recipe, chain.ranked, [root / "fid.json"], root.parent / "report")


def read_with_something_hostile(
    chain: TinyChain, draw: Callable[[Any], Any], read: Callable[[TinyChain], None]
) -> None:
    """Put something hostile into one of the run's files, read the run, and put the file back."""
    root = chain.places.root
    signed = [*root.rglob("manifest.json"), *root.rglob(CHECKSUMS)]
    file = draw(st.sampled_from(json_files(root)).map(lambda path: path.relative_to(root)))
    whole = {path: path.read_bytes() for path in {*signed, root / file}}
    value = replaced(content_of(root / file), draw)
    try:
        if file.name == "manifest.json" and isinstance(value, dict):
            value["checksum"] = manifest_checksum(value)
        write(root / file, value)
        sign_again(root, root / file)
        read(chain)
    finally:
        for path, content in whole.items():
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("read", "examples"),
    [
        (read_everything, 60),
        (report_everything, 10),
        pytest.param(read_everything, 120, marks=pytest.mark.slow),
        pytest.param(report_everything, 30, marks=pytest.mark.slow),
    ],
)
def test_no_json_of_a_run_ends_in_a_traceback(
    chain: TinyChain, read: Callable[[TinyChain], None], examples: int
) -> None:
    @settings(max_examples=examples, derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        read_with_something_hostile(chain, data.draw, read)

    check()


def test_an_unchanged_run_is_read(chain: TinyChain) -> None:
    """Show that the test above does not pass because of its own mistakes."""
    assert verify(chain.places.root).damage == []
    signed = {path: path.read_bytes() for path in chain.places.root.rglob(CHECKSUMS)}
    sign_again(chain.places.root, chain.places.root)
    assert {path: path.read_bytes() for path in signed} == signed
    read_everything(chain)
    report = write_report(chain.recipe, chain.ranked, [chain.places.root / "fid.json"], chain.places.root.parent / "r")
    assert report.figures.fid[0].system.accuracy["seen pairs"].by_pool_size[2].value == 0.5
    assert load_recipe(chain.recipe_file) == chain.recipe
