"""PowerSGD between two nodes of two ranks, against the published algorithm, PyTorch's hook and one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.power_sgd_training import Study, shapes_tokens
from helpers.two_nodes import (
    COLUMNS,
    LARGE,
    NODE_SIZE,
    RANK,
    SETTINGS,
    SHARDS,
    SMALL,
    STEPS,
    TINY,
    TRAINED,
    first_factors,
    gradients,
    run_scenario,
)
from numpy.typing import NDArray
from pydantic import ValidationError

from dalle_cli.config.schema import PowerSgd, PriorSettings
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.distributed.compression import (
    compression_batches,
    compression_rate,
    flat_shard_shape,
    is_compressed,
    numbers_sent,
    paper_compression_rate,
    shard_rank,
    shard_shape,
)
from dalle_cli.precision.formats import MEAN
from dalle_cli.prior.model import Prior
from dalle_cli.prior.train import TokenBatch

Arrays = dict[str, NDArray[np.float64]]
NODES, OWN_RANK = 2, RANK // NODE_SIZE
LOW = ("wide", "ragged", "tall")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_scenario("numbers", tmp_path_factory.mktemp("numbers"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_scenario("trained", tmp_path_factory.mktemp("trained"))


# Reducing


def matrix(name: str, gradient: torch.Tensor) -> NDArray[np.float64]:
    """Return a shard as the matrix that is compressed."""
    columns = COLUMNS[name]
    rows = -(-gradient.numel() // columns)
    padded = np.zeros(rows * columns)
    padded[: gradient.numel()] = gradient.flatten().numpy()
    return padded.reshape(rows, columns)


def naive(place: int, warm_start: bool, error_feedback: bool, start_update: int) -> list[Arrays]:
    """Return each step's result by algorithms 1 and 2 of Vogels et al. 2019, for all nodes at once."""
    ranks = [place, place + NODE_SIZE]
    outputs: list[Arrays] = [{} for _ in range(STEPS)]
    for name in LOW:
        q = start = first_factors()[name].numpy().astype(float)
        errors = [np.zeros(1)] * NODES
        for step in range(STEPS):
            deltas = [matrix(name, gradients(rank, step)[name]) for rank in ranks]
            if step < start_update:
                outputs[step][name] = sum(deltas) / NODES
                continue
            deltas = [delta + error for delta, error in zip(deltas, errors, strict=True)]
            p = np.mean([delta @ q for delta in deltas], axis=0)
            for i in range(p.shape[1]):  # Gram-Schmidt
                for j in range(i):
                    p[:, i] -= (p[:, j] @ p[:, i]) * p[:, j]
                p[:, i] /= np.linalg.norm(p[:, i])
            new = np.mean([delta.T @ p for delta in deltas], axis=0)
            outputs[step][name] = p @ new.T
            if error_feedback:
                errors = [delta - outputs[step][name] for delta in deltas]
            q = new if warm_start else start
    return outputs


@pytest.mark.parametrize("case", SETTINGS)
def test_the_published_algorithm(case: str, found: list[dict[str, Any]]) -> None:
    settings = SETTINGS[case]
    for rank, own in enumerate(found):
        wanted = naive(rank % NODE_SIZE, settings.warm_start, settings.error_feedback, settings.start_update)
        for step in range(STEPS):
            outputs = own[case]["outputs"][step]
            for name in LOW:
                assert outputs[name].shape == SHARDS[name][0]
                flat = wanted[step][name].flatten()[: outputs[name].numel()]
                np.testing.assert_allclose(outputs[name].flatten().numpy(), flat, atol=2e-5)
            for name in ("gain", "small"):
                mean = sum(gradients(r, step)[name] for r in (rank % NODE_SIZE, rank % NODE_SIZE + NODE_SIZE)) / NODES
                torch.testing.assert_close(outputs[name], mean)
    # The settings matter: only "warm" has the hook's warm start and error feedback from the first step.
    as_hook = torch.allclose(found[0][case]["outputs"][-1]["wide"], found[0]["peer"][-1]["wide"], atol=1e-3)
    assert as_hook == (case == "warm")


def test_pytorchs_hook(found: list[dict[str, Any]]) -> None:
    for own in found:
        for outputs, peers in zip(own["warm"]["outputs"], own["peer"], strict=True):
            for name, peer in peers.items():
                torch.testing.assert_close(outputs[name], peer, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ["warm", "fixed", "late"])
def test_results_and_error_buffers_add_up_to_the_gradients(case: str, found: list[dict[str, Any]]) -> None:
    for place in range(NODE_SIZE):
        ranks = [place, place + NODE_SIZE]
        for name in LOW:
            total = sum(matrix(name, gradients(rank, step)[name]) for rank in ranks for step in range(STEPS)) / NODES
            # The padding of a last row is sent too and dropped, so it is left out here.
            sent = sum(matrix(name, outputs[name]) for outputs in found[place][case]["outputs"])
            left = sum(found[rank][case]["state"][f"error.{name}"].double().numpy() for rank in ranks) / NODES
            kept = slice(SHARDS[name][0][0] if len(SHARDS[name][0]) == 1 else None)
            np.testing.assert_allclose((sent + left).flatten()[kept], total.flatten()[kept], atol=5e-5)
            assert np.abs(left).max() > 0.1


def test_nodes_get_the_same_bytes(found: list[dict[str, Any]]) -> None:
    for place in range(NODE_SIZE):
        for case in SETTINGS:
            for one, other in zip(
                found[place][case]["outputs"], found[place + NODE_SIZE][case]["outputs"], strict=True
            ):
                assert all(torch.equal(one[name], other[name]) for name in SHARDS)


def test_bytes_sent_follow_the_formula(found: list[dict[str, Any]]) -> None:
    shapes = {name: (-(-int(np.prod(SHARDS[name][0])) // n), n) for name, n in COLUMNS.items()}
    low = 4 * (sum(OWN_RANK * sum(shapes[name]) for name in LOW) + 5 + 12)
    whole = 4 * sum(int(np.prod(shape)) for shape, _ in SHARDS.values())
    for own in found:
        assert own["warm"]["bytes"] == [low] * STEPS
        assert own["late"]["bytes"] == [whole] * 2 + [low] * (STEPS - 2)
    assert low == 4 * (sum(numbers_sent(shape, OWN_RANK) for shape in shapes.values()) + 5)
    saved = 1 - (low / 4 - 5) / sum(rows * n for rows, n in shapes.values())
    assert compression_rate(shapes.values(), OWN_RANK) == pytest.approx(saved)


def test_a_loaded_state_continues_bit_for_bit(found: list[dict[str, Any]]) -> None:
    for own in found:
        for one, other in zip(own["warm"]["outputs"], own["resumed"]["outputs"], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in SHARDS)
        assert own["resumed"]["state"].keys() == own["warm"]["state"].keys()
        assert all(torch.equal(value, own["warm"]["state"][key]) for key, value in own["resumed"]["state"].items())
        assert set(own["warm"]["state"]) == {f"{kind}.{name}" for kind in ("error", "factor") for name in LOW}
        assert set(own["fixed"]["state"]) == {f"error.{name}" for name in LOW}
        assert set(own["no feedback"]["state"]) == {f"factor.{name}" for name in LOW}


@pytest.mark.parametrize("kind", ["not finite", "halves"], ids=["32 bit", "16 bit"])
def test_a_nan_reaches_all_ranks(found: list[dict[str, Any]], kind: str) -> None:
    for rank, own in enumerate(found):
        case = own[kind]
        assert all(case["broken"][name].isnan().all() for name in LOW)
        assert all(case["broken"][name].isfinite().all() for name in ("gain", "small"))
        # The error buffer with the NaN is cleared, on the second node; all others and the factors stay.
        kept = [name for name in LOW if rank < NODE_SIZE or name != "wide"]
        assert set(case["after"]) == {f"factor.{name}" for name in LOW} | {f"error.{name}" for name in kept}


def test_a_nan_leaves_nothing_behind(found: list[dict[str, Any]]) -> None:
    """Finite errors keep the gradient that was not sent, as in the paper (appendix E.2, step 12)."""
    for own in found:
        case = own["not finite"]
        assert case["after"].keys() == case["left"].keys()
        assert all(torch.equal(value, case["left"][key]) for key, value in case["after"].items())
        assert all(torch.equal(case["next"][name], case["wanted"][name]) for name in SHARDS)
        assert all(case["next"][name].isfinite().all() for name in SHARDS)


@pytest.mark.parametrize(("kind", "rounding"), [("32 bit", 0.0), ("16 bit", 2.0**-10)])
def test_saved_errors_are_summed_and_shared(kind: str, rounding: float, found: list[dict[str, Any]]) -> None:
    def values(stored: torch.Tensor, name: str) -> torch.Tensor:
        decoded = MEAN.decode(stored) if stored.dtype == torch.uint16 else stored
        return decoded.flatten()[: math.prod(SHARDS[name][0])]

    for place in range(NODE_SIZE):
        cases = [found[rank]["shared"][kind] for rank in (place, place + NODE_SIZE)]
        for name in LOW:
            total = sum(values(case["before"][f"error.{name}"], name) for case in cases)
            assert total.abs().max() > 0.1
            for case in cases:
                saved = values(case["saved"][name], name)
                torch.testing.assert_close(saved, total, rtol=rounding, atol=0)
                share = values(case["after"][f"error.{name}"], name)
                torch.testing.assert_close(share, saved / NODES, rtol=rounding, atol=0)
        for case in cases:
            assert not case["saved"]["small"].any()  # sent whole
            assert case["loaded"].keys() == case["after"].keys()
            assert all(torch.equal(value, case["after"][key]) for key, value in case["loaded"].items())


def test_16_bit_gradients_are_summed_in_32_bit(found: list[dict[str, Any]]) -> None:
    """Uncompressed gradients equal those in 32 bit; factors are rounded twice, each time by at most 2^-10."""
    for own in found:
        case = own["halves"]
        for name in SHARDS:
            output, exact = case["outputs"][name], case["exact"][name]
            assert output.dtype == torch.bfloat16
            if name not in LOW:
                assert torch.equal(output, exact.bfloat16())
                continue
            off = (output.float() - exact).norm() / exact.norm()
            assert 2**-13 < (exact.bfloat16() - exact).norm() / exact.norm() < off < 2**-7
        # 32-bit gradients beside them are sent in 32 bit.
        assert torch.equal(case["mixed"]["tall"], case["exact"]["tall"])
        assert all(torch.equal(case["mixed"][name], case["outputs"][name]) for name in SHARDS if name != "tall")


def test_factors_of_16_bit_gradients_take_half_the_bytes(found: list[dict[str, Any]]) -> None:
    whole = 4 * (5 + 12)
    for own in found:
        assert own["halves"]["bytes"] - whole == (own["warm"]["bytes"][0] - whole) / 2


def test_small_16_bit_gradients_are_as_exact_as_large_ones(found: list[dict[str, Any]]) -> None:
    """The squares of these gradients, 2^-80, would be zero in 1-6-9."""
    for own in found:
        for step, outputs in enumerate(own["small"]):
            for name in LOW:
                as_large = own["16 bit"]["outputs"][step][name].float() / own["16 bit"]["scales"].get(name, 1.0)
                off = (outputs[name].float() / SMALL - as_large).norm() / as_large.norm()
                assert off < 0.02


def test_what_overflows_16_bit_is_sent_later(found: list[dict[str, Any]]) -> None:
    """1-6-9 ends at 16 - 2^-6. A factor of 40 sends that twice and then the rest."""
    for own in found:
        sizes = [output[:, 3].float().norm() for output in own["large"]]
        assert sizes == pytest.approx([16, 16, LARGE - 32, 0], abs=0.2)
        total = sum(output.float() for output in own["large"])
        wanted = torch.zeros(12, 20)
        wanted[:, 3] = LARGE / 12**0.5
        torch.testing.assert_close(total, wanted, atol=0.1, rtol=0)


def test_16_bit_results_and_error_buffers_add_up_to_the_gradients(found: list[dict[str, Any]]) -> None:
    """They do so up to the rounding of both."""
    for place in range(NODE_SIZE):
        ranks = [place, place + NODE_SIZE]
        scales = found[place]["16 bit"]["scales"]
        for name in LOW:
            scale = scales.get(name, 1.0)
            given = [
                [matrix(name, (gradients(r, s)[name] * scale).bfloat16().float() / scale) for s in range(STEPS)]
                for r in ranks
            ]
            outputs = [out[name].float() / scale for out in found[place]["16 bit"]["outputs"]]
            sent = sum(matrix(name, output) for output in outputs)
            left = sum(MEAN.decode(found[r]["16 bit"]["state"][f"error.{name}"]).double().numpy() for r in ranks)
            total = np.sum(given, axis=(0, 1)) / NODES
            kept = slice(SHARDS[name][0][0] if len(SHARDS[name][0]) == 1 else None)
            # Rounding to bfloat16 and stochastic rounding of an error both change a number by at most 2^-9.
            room = STEPS * 2**-9 * (max(float(o.abs().max()) for o in outputs) + 2 * np.abs(left).max())
            np.testing.assert_allclose((sent + left / NODES).flatten()[kept], total.flatten()[kept], atol=room)
            assert np.abs(left).max() > 5 * room
    for own in found:
        state = own["16 bit"]["state"]
        assert set(state) == {f"{kind}.{name}" for kind in ("error", "factor") for name in LOW}
        assert all(value.dtype == torch.uint16 for value in state.values())


def test_a_loaded_16_bit_state_continues_bit_for_bit(found: list[dict[str, Any]]) -> None:
    for own, other in zip(found, found[NODE_SIZE:] + found[:NODE_SIZE], strict=True):
        for one, two, theirs in zip(
            *(own["16 bit"][key] for key in ("outputs", "undisturbed")), other["16 bit"]["outputs"], strict=True
        ):
            assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], theirs[name]) for name in SHARDS)


def test_one_matrix_at_a_time_gives_the_same(found: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(found):
        case = own["one by one"]
        for one, other in zip(own["warm"]["outputs"], case["outputs"], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in SHARDS)
        assert all(torch.equal(value, case["state"][key]) for key, value in own["warm"]["state"].items())
        assert case["bytes"] == sum(own["warm"]["bytes"])
        # The non-finite matrix affects no other.
        assert case["broken"]["wide"].isnan().all()
        assert ("error.wide" in case["after"]) == (rank < NODE_SIZE)
        assert case["broken"]["tall"].isfinite().all()
        assert "error.tall" in case["after"]


def test_initial_factors_depend_on_seed_and_name(found: list[dict[str, Any]]) -> None:
    first, *others = [own["drawn"] for own in (found[0], found[2])]
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    values = list(first.values())
    assert not any(torch.allclose(values[i], values[j]) for i in range(4) for j in range(i))


def test_one_node_sends_nothing(found: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(found):
        assert own["alone"]["bytes"] == 0
        assert all(torch.equal(own["alone"]["outputs"][name], g) for name, g in gradients(rank, 0).items())


def test_a_state_of_other_parameters_is_refused(found: list[dict[str, Any]]) -> None:
    for own in found:
        other, kind, size = own["refused"]
        assert other.startswith("'error.other' is no part of")
        assert kind.startswith("'moment.wide' is no part of")
        assert "wide is (12, 19)" in size
        assert "(12, 20)" in size


@pytest.mark.parametrize("wrong", [{"rank": -1}, {"start_update": -1}, {"min_compression": -0.5}, {"ranks": 4}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PowerSgd.model_validate(wrong)


# Training


def one_process(study: Study) -> tuple[list[float], Prior]:
    """Make the same updates with PyTorch's optimizer on whole batches; return the losses and the prior."""
    prior, adam = study.prior(), PriorSettings().adam
    decayed = prior.decayed_parameters()
    rest = [p for name, p in prior.named_parameters() if name not in decayed]
    optimizer = torch.optim.AdamW(
        [{"params": decayed.values(), "weight_decay": adam.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
    )
    tokens = shapes_tokens(study.grid, range(study.scenes))
    order = BatchOrder(np.arange(study.scenes), study.batch_size, study.seed)
    losses = []
    for update in range(study.updates):
        rows, _ = order.batch(update)
        batch = TokenBatch(tokens.text[rows], tokens.length[rows], tokens.image[rows])
        loss = prior.loss(batch.text, batch.length, batch.image)
        value = loss.text / 8 + 7 / 8 * loss.image
        optimizer.zero_grad()
        value.backward()
        assert adam.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(prior.parameters(), adam.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = study.rate(update)
        optimizer.step()
        losses.append(float(value.detach()))
    return losses, prior


def test_uncompressed_training_equals_one_process(trained: list[dict[str, Any]]) -> None:
    losses, _ = one_process(TINY)
    assert len(losses) == 20
    assert losses[-1] < 0.85 * losses[0]
    for own in trained:
        np.testing.assert_allclose(own["whole"]["losses"], losses, atol=1e-5, rtol=0)


def test_full_rank_loses_nothing(trained: list[dict[str, Any]]) -> None:
    for own in trained:
        np.testing.assert_allclose(own["full rank"]["losses"], own["whole"]["losses"], atol=1e-5, rtol=0)
        assert own["full rank"]["bytes"] > own["whole"]["bytes"]  # so the gradients did go through factors


def test_low_rank_trains_and_starts_when_set(trained: list[dict[str, Any]]) -> None:
    for own in trained:
        whole, low, late = (own[name]["losses"] for name in ("whole", "low rank", "whole, then low"))
        assert low[-1] < 0.85 * low[0]
        assert max(abs(a - b) for a, b in zip(whole, low, strict=True)) > 1e-4
        # A loss is computed before its update, so the first compressed update shows in the next loss.
        assert late[:6] == whole[:6]
        assert late[6] != whole[6]


def test_16_bit_trains_as_32_bit_does(trained: list[dict[str, Any]]) -> None:
    for own in trained:
        low, half = own["low rank"], own["16 bit"]
        assert half["losses"] != low["losses"]
        np.testing.assert_allclose(half["losses"], low["losses"], rtol=0.02)
        assert half["held_out"] == pytest.approx(low["held_out"], rel=0.02)


def test_bytes_of_training_follow_from_the_shards(trained: list[dict[str, Any]]) -> None:
    prior = TINY.prior()
    decayed = prior.decayed_parameters()
    rest = sum(-(-p.numel() // NODE_SIZE) for name, p in prior.named_parameters() if name not in decayed)
    shapes = [flat_shard_shape((p.shape[0], p.shape[1]), NODE_SIZE) for p in decayed.values()]
    rank = shard_rank(TRAINED["low rank"].rank, NODE_SIZE)
    in_32_bit = 4 * (rest + sum(numbers_sent(shape, rank) for shape in shapes))
    low = sum(numbers_sent(shape, rank) for shape in shapes if is_compressed(shape, rank))
    assert {own["whole"]["bytes"] for own in trained} == {4 * (rest + sum(rows * n for rows, n in shapes))}
    assert {own["low rank"]["bytes"] for own in trained} == {in_32_bit}
    assert low
    assert {own["16 bit"]["bytes"] for own in trained} == {in_32_bit - 2 * low}


@pytest.mark.slow
def test_low_rank_comes_within_two_percent(tmp_path: Path) -> None:
    for own in run_scenario("converged", tmp_path, timeout=1800):
        whole = np.mean(own["0"]["losses"][-50:])
        # Rank 4 is 2 per shard, which trains less well (1.07 against 1.02 at the end of this run).
        for rank, room in (("4", 1.1), ("16", 1.02)):
            assert np.mean(own[rank]["losses"][-50:]) < room * whole
            assert own[rank]["held_out"] < room * own["0"]["held_out"]
        assert own["16"]["bytes"] < 0.5 * own["0"]["bytes"]
        assert np.mean(own["16 bit"]["losses"][-50:]) < 1.02 * whole
        assert own["16 bit"]["held_out"] < 1.02 * own["0"]["held_out"]
        assert own["16 bit"]["bytes"] < 0.75 * own["16"]["bytes"]


# The closed form


@pytest.mark.parametrize(("d_model", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_the_papers_table(d_model: int, rank: int, percent: int) -> None:
    assert round(100 * paper_compression_rate(d_model, rank)) == percent
    assert paper_compression_rate(d_model, rank) == pytest.approx(1 - 5 * rank / (8 * d_model))
    # Appendix E.1: each matrix is cut in eight along its longer side, and each shard has an eighth of the rank.
    cut = d_model // 8
    shards = [(d_model, cut)] * 4 + [(d_model, 4 * cut), (4 * cut, d_model)]
    assert compression_rate(shards, shard_rank(rank, 8)) == pytest.approx(paper_compression_rate(d_model, rank))
    # This project's matrices are cut likewise, but query, key and value are one.
    d = d_model
    ours = [shard_shape(shape, 8) for shape in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))]
    assert ours == [(3 * cut, d), (cut, d), (4 * cut, d), (d, 4 * cut)]
    assert compression_rate(ours, shard_rank(rank, 8)) == pytest.approx(1 - 11 * rank / (24 * d_model))


def test_past_break_even_a_matrix_is_sent_whole() -> None:
    assert is_compressed((20, 20), 9)
    assert not is_compressed((20, 20), 10)
    assert numbers_sent((20, 20), 9) == 360
    assert numbers_sent((20, 20), 10) == numbers_sent((20, 20), 99) == 400
    assert not is_compressed((20, 20), 4, min_compression=2.5)
    assert is_compressed((20, 20), 4, min_compression=2.4)
    assert numbers_sent((20, 10), 99, min_compression=0) == 300
    assert not is_compressed((20, 20), 0, min_compression=0)
    assert compression_rate([(20, 20)], 10) == 0
    assert compression_rate([(20, 20)], 5) == 0.5
    assert shard_shape((10, 7), 4) == flat_shard_shape((10, 7), 4) == (3, 7)
    assert (shard_shape((7, 12), 4), flat_shard_shape((7, 12), 4)) == ((7, 3), (2, 12))
    assert shard_shape((7, 13), 4) == (2, 13)
    assert shard_rank(9, 4) == 3


def test_matrices_are_compressed_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_cli.distributed.compression.BATCH_NUMBERS", 20)
    shapes = [(3, 4), (2, 4), (1, 1), (7, 7), (1, 2), (3, 6)]
    assert [shapes[places] for places in compression_batches(shapes)] == [
        shapes[:2],
        shapes[2:3],
        shapes[3:4],
        shapes[4:],
    ]
    assert list(compression_batches([])) == []
