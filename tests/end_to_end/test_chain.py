"""The commands as a user meets them: a chain stage by stage, shell pipes, help, completion, refused combinations."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import Call
from helpers.running import DALLE, ENVIRONMENT, Chain, run, smallest_recipe, write_recipe
from helpers.tiny_network import write_tiny_network
from PIL import Image

from dalle_cli.app import PANELS
from dalle_cli.data.open_source import open_source
from dalle_cli.dvae.perceptual import PerceptualDistance
from dalle_cli.pretrained import PretrainedFeatures, weights_hash
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.bpe import Tokenizer

COMMANDS = [name for commands in PANELS.values() for name in commands]
CAPTION = "a small red star above a large blue square"
HEAVY = (
    "torch",
    "numpy",
    "zarr",
    "PIL",
    "open_clip",
    "tokenizers",
    "matplotlib",
    "scipy",
    "yaml",
    "jinja2",
    "dalle_cli.config.schema",
)


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``line`` in a real shell, where ``dalle`` is the one under test."""
    path = f"{Path(DALLE).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env={**ENVIRONMENT, "PATH": path}, capture_output=True, text=True, timeout=120
    )


def test_the_chain_stage_by_stage(by_hand: Chain) -> None:
    outputs = {
        "make-shapes": by_hand.root / "shapes",
        "train-tokenizer": by_hand.tokenizer / "tokenizer.json",
        "tokenize-text": by_hand.tokens,
        "train-dvae": by_hand.dvae / "step-00000012",
        "encode-images": by_hand.tokens,
        "train-prior": by_hand.prior / "step-00000012",
        "train-clip": by_hand.clip / "step-00000012",
    }
    for name, place in outputs.items():
        done = by_hand.stages[name]
        assert done.out == f"{place}\n", name  # stdout has the path of the result and nothing else
        assert place.exists()
        assert done.err
        assert "\x1b" not in done.err
        assert "Warning" not in done.err
    assert not (by_hand.root / "unused").exists()  # every path was given, so the recipe's was not used

    source, reader = open_source(str(by_hand.train)), TokenReader(by_hand.tokens)
    rows = np.arange(len(source))
    assert reader.strings("key", rows) == [source.key(row) for row in rows]
    assert reader.strings("caption", rows) == [source.captions(row)[0] for row in rows]
    dvae, prior, clip = (open_checkpoint(p) for p in (by_hand.dvae, by_hand.prior, by_hand.clip))
    tokenizer = Tokenizer.load(by_hand.tokenizer)
    source = open_source(by_hand.train).identity
    assert prior.belongs == {"tokenizer": tokenizer.identity, "dvae": dvae.identity, "source": source}
    assert clip.belongs == {"tokenizer": tokenizer.identity, "source": source}
    text, lengths = reader.read("text", rows), reader.read("text_length", rows)
    whole = tokenizer.encode(reader.strings("caption", rows))
    np.testing.assert_array_equal(text, whole.padded(text.shape[1]))
    np.testing.assert_array_equal(lengths, whole.counts)


def test_sample_piped_into_rerank_prints_the_best(by_hand: Chain) -> None:
    prior, clip = shlex.quote(str(by_hand.prior)), shlex.quote(str(by_hand.clip))
    out = by_hand.root / "piped"
    done = shell(
        f"set -o pipefail; dalle sample {prior} '{CAPTION}' --n 4 --out {out} | tee all.jsonl"
        f" | dalle rerank --clip {clip} --top 1",
        by_hand.root,
    )
    assert done.returncode == 0, done.stderr
    (best,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (best["prompt"], best["rank"], best["seed"]) == (CAPTION, 1, 0)
    with Image.open(best["png"]) as picture:
        assert picture.format == "PNG"
        assert picture.size == (32, 32)
    drawn = [json.loads(line) for line in (by_hand.root / "all.jsonl").read_text().splitlines()]
    assert [line["index"] for line in drawn] == [0, 1, 2, 3]
    assert {key: best[key] for key in drawn[0]} == drawn[best["index"]]
    store = zarr.open_group(best["store"], mode="r")
    assert store["tokens"].shape == (4, 4, 4)
    assert int(np.asarray(store["tokens"]).max()) < 16
    scores = np.asarray(store["log_likelihood"])
    assert [line["log_likelihood"] for line in drawn] == pytest.approx(scores, abs=1e-4)


def test_rerank_without_arguments_reads_stdin_and_ranks_all(by_hand: Chain) -> None:
    drawn = run("sample", by_hand.prior, CAPTION, "a red cross", "--n", 2, "--out", by_hand.prior.parent / "whole")
    done = run("rerank", stdin=drawn.out)
    assert done.code == 0, done.err
    assert [(line["prompt"], line["rank"]) for line in done.lines] == [
        (CAPTION, 1), (CAPTION, 2), ("a red cross", 1), ("a red cross", 2),
    ]  # fmt: skip
    assert [line["score"] for line in done.lines[:2]] == sorted(
        (line["score"] for line in done.lines[:2]), reverse=True
    )


def test_a_closed_pipe_is_no_error(by_hand: Chain) -> None:
    prior = shlex.quote(str(by_hand.prior))
    done = shell(f"dalle sample {prior} '{CAPTION}' --n 600 --batch-size 2 --out gone | head -1", by_hand.root)
    assert json.loads(done.stdout)["index"] == 0
    assert all(line.startswith("sample: ") for line in done.stderr.splitlines()), done.stderr
    assert int(zarr.open_group(by_hand.root / "gone" / "samples.zarr", mode="r").attrs["rows"]) < 600


def test_a_sample_is_a_function_of_its_prompt_seed_and_index(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    def draw(name: str, *arguments: object) -> dict[tuple[str, int], bytes]:
        done = call("sample", by_hand.prior, "--out", tmp_path / name, *arguments)
        assert done.code == 0, done.err
        return {(line["prompt"], line["index"]): Path(line["png"]).read_bytes() for line in done.lines}

    whole = draw("whole", CAPTION, "a red cross", "--n", 5)
    assert len(whole) == 10
    assert len(set(whole.values())) > 5
    for name, arguments in {
        "alone": (CAPTION, "--n", 1),
        "fewer": (CAPTION, "--n", 3, "--batch-size", 2),
        "other company": ("a red cross", CAPTION, "--n", 5, "--batch-size", 1),
    }.items():
        assert draw(name, *arguments).items() <= whole.items(), name
    assert draw("another seed", CAPTION, "--n", 5, "--seed", 1).items() & whole.items() == set()


def test_the_same_request_again_is_the_same_samples(by_hand: Chain, call: Call) -> None:
    first = call("sample", by_hand.prior, CAPTION)
    folder = Path(first.lines[0]["png"]).parent
    assert folder.parent == by_hand.prior.parent / "samples"  # beside the prior's run
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    again = call("sample", by_hand.prior, CAPTION, "--batch-size", 2)
    assert len(times) == 4
    assert again.out == first.out
    assert times == {file: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    other = call("sample", by_hand.prior, CAPTION, "--temperature", 0.5)
    assert Path(other.lines[0]["png"]).parent != folder
    refused = call("sample", by_hand.prior, CAPTION, "--temperature", 0.5, "--out", folder).mistake()
    assert str(folder) in refused
    assert "--out" in refused


def test_prompts_of_a_file_of_a_source_and_left_out(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red star\n\n  a blue circle \n")
    done = call("sample", by_hand.prior, "--captions", file, "--n", 1, "--out", tmp_path / "a")
    assert [line["prompt"] for line in done.lines] == ["a red star", "a blue circle"]
    done = call("sample", by_hand.prior, "--data", by_hand.train, "--limit", 2, "--n", 1, "--out", tmp_path / "b")
    source = open_source(str(by_hand.train))
    assert [line["prompt"] for line in done.lines] == [source.captions(0)[0], source.captions(1)[0]]
    done = call("sample", by_hand.prior, "--held-out", "--limit", 2, "--n", 1, "--out", tmp_path / "c")
    assert len(done.lines) == 2


def test_artifacts_that_do_not_belong_together_are_refused(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    data = ("--data", by_hand.train)
    other_dvae = tmp_path / "other" / "dvae"
    assert call("train-dvae", by_hand.recipe, *data, "--out", other_dvae, "--set", "seed=1").code == 0
    other_words = tmp_path / "other" / "tokenizer"
    vocabulary = ("--set", "tokenizer.vocab_size=300")
    assert call("train-tokenizer", by_hand.recipe, *data, "--out", other_words, *vocabulary).code == 0
    prior, clip = open_checkpoint(by_hand.prior), open_checkpoint(by_hand.clip)
    dvae, words = open_checkpoint(other_dvae).identity, Tokenizer.load(other_words).identity

    refused = call("sample", by_hand.prior, CAPTION, "--dvae", other_dvae, "--out", tmp_path / "s").mistake()
    for part in (str(prior.path), str(other_dvae), prior.belongs["dvae"][:12], dvae[:12]):
        assert part in refused
    refused = call("sample", by_hand.prior, CAPTION, "--tokenizer", other_words, "--out", tmp_path / "s").mistake()
    for part in (str(prior.path), str(other_words), prior.belongs["tokenizer"][:12], words[:12]):
        assert part in refused
    assert not (tmp_path / "s").exists()

    lines = tmp_path / "lines.jsonl"
    lines.write_text(call("sample", by_hand.prior, CAPTION, "--out", tmp_path / "drawn").out)
    refused = call("rerank", lines, "--clip", by_hand.clip, "--tokenizer", other_words).mistake()
    for part in (str(clip.path), str(other_words), clip.belongs["tokenizer"][:12], words[:12]):
        assert part in refused


def test_a_stage_that_is_not_finished_can_be_used_and_says_where_it_stands(
    by_hand: Chain, call: Call, tmp_path: Path
) -> None:
    shutil.copytree(by_hand.dvae, tmp_path / "dvae")
    shutil.rmtree(tmp_path / "dvae" / "step-00000012")  # as if it had been killed after update 8
    arguments = ("encode-images", by_hand.recipe, "--data", by_hand.train, "--tokens", tmp_path / "tokens.zarr")
    done = call(*arguments, "--dvae", tmp_path / "dvae")
    assert done.code == 0, done.err
    said = f"{tmp_path}/dvae: its training is not finished; it stands at update 8 of 12, and step-0000000"
    assert said in done.err
    assert "is not finished" not in by_hand.stages["encode-images"].err


def test_a_report_has_no_absolute_path_of_the_machine(
    by_hand: Chain, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(by_hand.train, tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(Path(), smallest_recipe(Path("run"), Path("pictures")))
    for command in ("train-tokenizer", "tokenize-text", "train-dvae", "encode-images", "train-prior", "train-clip"):
        assert call(command, recipe).code == 0, command
    Path("run/samples.jsonl").write_text(call("sample", "run", CAPTION, "a red circle", "--n", 2).out)
    Path("run/ranked.jsonl").write_text(call("rerank", "run/samples.jsonl").out)
    measure = ("--size", 32, "--clip", "run", "--page", "run/evaluation", "--cache", "cache")
    assert call("eval-fid", "run/ranked.jsonl", "pictures", *measure).code == 0
    assert call("report", recipe, "--ranked", "run/ranked.jsonl").code == 0
    for page in ("run/report.html", "run/report.json", "run/evaluation/index.html", "run/evaluation/figures.json"):
        assert str(tmp_path) not in Path(page).read_text(), page


def test_a_run_that_lacks_a_stage_names_it(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    drawn = tmp_path / "lines.jsonl"
    drawn.write_text(call("sample", by_hand.prior, CAPTION, "--n", 1, "--out", tmp_path / "run" / "samples").out)
    for stage, command, mistake in (
        ("prior", ("sample", tmp_path / "run", CAPTION), "this run has no prior yet; train it with dalle train-prior"),
        ("dvae", ("sample", tmp_path / "run", CAPTION), "this run has no dvae yet; train it with dalle train-dvae"),
        ("tokenizer", ("sample", tmp_path / "run", CAPTION), "make one with dalle train-tokenizer"),
        (
            "clip",
            ("rerank", drawn, "--clip", tmp_path / "run"),
            "this run has no clip yet; train it with dalle train-clip",
        ),
    ):
        run_folder = tmp_path / "run"
        shutil.rmtree(run_folder, ignore_errors=True)
        run_folder.mkdir()
        for name in {"tokenizer", "dvae", "prior", "clip"} - {stage}:
            shutil.copytree(by_hand.root / "made" / name, run_folder / name)
        assert mistake in call(*command).mistake(), stage


def test_set_changes_a_setting_and_is_saved_with_the_artifact(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    arguments = ("train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", tmp_path / "prior")
    done = call(*arguments, "--set", "prior.training.updates=2", "--set", "prior.model.layout=row, conv, ...")
    assert done.out == f"{tmp_path / 'prior' / 'step-00000002'}\n"
    model = open_checkpoint(tmp_path / "prior").recipe().prior.model
    assert model.attention_kinds() == ["row", "conv", "row"]


def test_debug_shows_the_traceback(by_hand: Chain) -> None:
    plain = run("show", "nowhere.yaml")
    assert "nowhere.yaml" in plain.mistake()
    for arguments in (("--debug", "show", "nowhere.yaml"), ("show", "nowhere.yaml", "--debug")):
        done = run(*arguments)
        assert done.code == 1
        assert "Traceback" in done.err
        assert "UserError" in done.err


def test_ctrl_c_saves_and_a_second_one_ends_at_once(by_hand: Chain, tmp_path: Path) -> None:
    command = [DALLE, "train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", tmp_path / "prior"]
    command += ["--set", "prior.training.updates=100000", "--set", "prior.training.save_every=100000"]
    journal = tmp_path / "prior" / "metrics.jsonl"

    def interrupted(times: int) -> tuple[int, str]:
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(
            [*map(str, command)],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
            # A job that was started in the background ignores ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + 60
        while (not journal.exists() or journal.stat().st_size <= before) and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        return process.returncode, err

    code, err = interrupted(1)
    assert code == 75
    (saved,) = (tmp_path / "prior").glob("step-*")
    assert f"stopped by SIGINT: saved {saved}" in err
    code, err = interrupted(2)
    if code == 130:  # the second one came before the first was obeyed
        assert err.splitlines()[-1] == "dalle: stopped; the same command goes on from what it has saved, if anything"
    else:
        assert code == 75


def test_help_of_every_command_imports_little_and_has_an_example() -> None:
    program = f"""
import sys
from typer.testing import CliRunner
from dalle_cli.app import app
texts = []
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
for name in {COMMANDS!r}:
    found = CliRunner().invoke(app, [name, "--help"])
    assert found.exit_code == 0, name
    texts.append(found.output)
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
print("\\f".join(texts))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.stderr == "[]\n"
    texts = done.stdout.split("\f")
    assert len(texts) == len(COMMANDS)
    for name, text in zip(COMMANDS, texts, strict=True):
        assert f"dalle {name}" in text.partition("Example:")[2], name
        assert "Usage: " in text
        assert "--help" in text


def test_commands_import_no_library_that_they_do_not_need(by_hand: Chain, tmp_path: Path) -> None:
    """Importing torch takes seconds, and importing the others takes as long again."""
    others = ("torchvision", "timm", "open_clip", "torch_fidelity", "torch._dynamo")
    parts = ("--dvae", by_hand.dvae, "--tokenizer", by_hand.tokenizer)
    commands: dict[tuple[object, ...], tuple[str, ...]] = {
        ("sample", by_hand.prior, "a red star", "--n", 1, *parts, "--out", tmp_path / "samples"): others,
        ("encode-images", by_hand.recipe, "--data", by_hand.train, *parts[:2], "--tokens", tmp_path / "t.zarr"): others,
        ("init", tmp_path / "new.yaml", "--data", by_hand.train): ("torch", *others),
        ("show", by_hand.tokens): ("torch", *others),
        ("show", by_hand.prior): ("torch", *others),
    }
    for command, unneeded in commands.items():
        program = f"""
import sys
from dalle_cli.app import run_arguments
try:
    run_arguments()
finally:
    print([name for name in {unneeded!r} if name in sys.modules], file=sys.stderr)
"""
        arguments = [sys.executable, "-c", program, *map(str, command)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith("[]\n")


def test_help_lists_the_commands_in_the_order_of_the_pipeline() -> None:
    done = run("--help")
    assert done.code == 0
    places = [done.out.index(f"│ {name} ") for name in COMMANDS]
    assert places == sorted(places)
    pipeline = [
        "make-shapes",
        "train-tokenizer",
        "tokenize-text",
        "train-dvae",
        "encode-images",
        "train-prior",
        "sample",
    ]
    assert [name for name in COMMANDS if name in pipeline] == pipeline
    headings = [done.out.index(f"─ {panel} ─") for panel in PANELS]
    assert headings == sorted(headings)
    assert run("--version").out.startswith("dalle ")


def test_shells_complete_commands_and_options() -> None:
    script = subprocess.run(
        [DALLE, "--show-completion", "bash"],
        env={**ENVIRONMENT, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
    )
    assert script.returncode == 0
    assert "_dalle_completion" in script.stdout

    def complete(words: str) -> list[str]:
        line = f"""source /dev/stdin; COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}
        _dalle_completion {shlex.quote(DALLE)}; printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(
            ["bash", "-c", line], input=script.stdout, env=ENVIRONMENT, capture_output=True, text=True
        )
        return done.stdout.split()

    assert complete("dalle tr") == ["train-tokenizer", "train-dvae", "train-prior", "train-clip"]
    assert complete("dalle train-dvae --d") == ["--data"]


@pytest.mark.parametrize("command", ["train-tokenizer", "tokenize-text", "train-dvae", "train-clip"])
def test_a_recipe_without_pictures_says_how_to_name_them(call: Call, tmp_path: Path, command: str) -> None:
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", None))
    assert "--data SOURCE" in call(command, recipe).mistake()


def test_the_chain_with_a_finer_grid(by_hand: Chain, tmp_path: Path, call: Call) -> None:
    """Every stage has 8 x 8 tokens of a 32-pixel picture if ``downsampling`` is 4."""
    recipe = smallest_recipe(tmp_path / "run", by_hand.train)
    recipe["dvae"]["model"]["downsampling"] = 4
    recipe["prior"]["model"]["grid"] = 8
    file = write_recipe(tmp_path, recipe)
    for command in ("train-tokenizer", "tokenize-text", "train-dvae", "encode-images", "train-prior"):
        assert call(command, file).code == 0, command
    assert zarr.open_group(str(tmp_path / "run" / "tokens.zarr"), mode="r")["image"].shape[1:] == (8, 8)
    (line,) = call("sample", tmp_path / "run" / "prior", CAPTION, "--n", 1).lines
    with Image.open(line["png"]) as picture:
        assert picture.size == (32, 32)


def test_the_chain_with_pretrained_networks(by_hand: Chain, tmp_path: Path, call: Call) -> None:
    """A network's features guide the dVAE, are CLIP's picture tower, and measure the result."""
    network = str(tmp_path / "network")
    write_tiny_network(Path(network))
    recipe = smallest_recipe(tmp_path / "run", by_hand.train)
    recipe["dvae"]["objective"] = {"perceptual": {"weight": 2.0, "network": network}}
    recipe["clip"]["model"] |= {"vision": network, "vision_size": 48}
    file = write_recipe(tmp_path, recipe)
    for command in ("train-tokenizer", "tokenize-text", "train-dvae", "encode-images", "train-prior", "train-clip"):
        assert call(command, file).code == 0, command
    dvae, clip = (open_checkpoint(tmp_path / "run" / stage, stage) for stage in ("dvae", "clip"))
    assert dvae.metrics["perceptual"] > 0
    assert dvae.metrics["loss"] == pytest.approx(dvae.metrics["recon_nll"] + 2 * dvae.metrics["perceptual"])
    assert dvae.belongs["perceptual"] == weights_hash(PerceptualDistance(network))
    tower, trained = PretrainedFeatures(network).state_dict(), clip.tensors("ema")
    for name, weights in tower.items():
        torch.testing.assert_close(trained[f"visual.features.{name}"], weights, rtol=0, atol=0)
    shown = call("show", file).out
    assert "at 48 px" in " ".join(shown.split())
    samples = tmp_path / "samples.jsonl"
    samples.write_text(call("sample", tmp_path / "run" / "prior", CAPTION, "a red circle", "--n", 2).out)
    ranked = call("rerank", samples).lines
    assert sorted(line["rank"] for line in ranked) == [1, 1, 2, 2]
    measured = call("eval-fid", samples, by_hand.train, "--size", 32, "--features", network, "--cache", tmp_path)
    figures = json.loads(measured.out)
    assert figures["features"].startswith(f"{network} sha256:")
    assert figures["systems"][0]["kid_mean"] > 0
    write_tiny_network(Path(network), seed=1)
    mistake = call("train-dvae", file, "--set", "dvae.training.updates=16").mistake()
    assert "perceptual" in mistake
