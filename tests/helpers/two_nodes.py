"""Runs four gloo ranks as two nodes of two: python two_nodes.py SCENARIO FOLDER.

Each rank writes the result of its scenario to FOLDER/RANK.pt. For test_power_sgd.py and test_all_reduce_16bit.py.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from dalle_cli.config.schema import PowerSgd
from dalle_cli.distributed import all_reduce_16bit, compression, error_buffers
from dalle_cli.distributed.power_sgd import PowerSgdReducer
from dalle_cli.progress import silence
from helpers import power_sgd_training
from helpers.power_sgd_training import Study, join_nodes, train
from helpers.running import ENVIRONMENT

RANKS, NODE_SIZE, STEPS = 4, 2, 6
RANK = 4
# The shape of each shard of a gradient, and N if it is compressed. The last row of "ragged" is not full; the factors of
# "small" would have no fewer numbers than itself.
SHARDS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "wide": ((12, 20), 20),
    "gain": ((5,), None),
    "ragged": ((50,), 8),
    "tall": ((20, 6), 6),
    "small": ((3, 4), 4),
}
COLUMNS = {name: columns for name, (_, columns) in SHARDS.items() if columns}
TINY = Study(layers=2, heads=2, d_head=8, scenes=200, batch_size=8, updates=20, warmup=5)
TRAINED = {
    "whole": PowerSgd(),
    "full rank": PowerSgd(rank=NODE_SIZE * 16, min_compression=0),
    "low rank": PowerSgd(rank=4),
    "whole, then low": PowerSgd(rank=4, start_update=5),
}
# Long enough that the loss falls only slowly at the end.
LONG = Study(layers=2, heads=2, d_head=32, learning_rate=1e-3, updates=600)
SETTINGS = {
    "warm": PowerSgd(rank=RANK),
    "fixed": PowerSgd(rank=RANK, warm_start=False),
    "no feedback": PowerSgd(rank=RANK, error_feedback=False),
    "late": PowerSgd(rank=RANK, start_update=2),
}
LARGE, SMALL, CHUNK = 40.0, 2.0**-40, 5
NUMBERS = (1, 2, 3, 7, 50)
"""Lengths of the tensors averaged in 16 bit, some shorter than the number of nodes or no multiple of it."""


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    """Return the gradients of ``rank``: a part that all ranks have in common, plus noise of its own."""
    common, own = np.random.default_rng([9, step]), np.random.default_rng([rank, step])
    return {
        name: torch.from_numpy(common.normal(size=shape) + 0.3 * own.normal(size=shape)).float()
        for name, (shape, _) in SHARDS.items()
    }


def first_factors() -> dict[str, Tensor]:
    """Return the initial Q of each compressed gradient."""
    rng = np.random.default_rng(5)
    return {name: torch.from_numpy(rng.normal(size=(n, RANK // NODE_SIZE))).float() for name, n in COLUMNS.items()}


@dataclass
class Here:
    """One of the four ranks, with the group of its node and that of its shard."""

    rank: int
    node: dist.ProcessGroup
    place: dist.ProcessGroup

    def reducer(self, settings: PowerSgd) -> PowerSgdReducer:
        """Return a reducer that starts with ``first_factors``."""
        reducer = PowerSgdReducer(settings, self.place, COLUMNS, shards=NODE_SIZE)
        factors = {name: q for name, q in first_factors().items() if name != "small"}
        reducer.load_state_dict({f"factor.{name}": q for name, q in factors.items()})
        return reducer

    def step(self, reducer: PowerSgdReducer, step: int, found: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Reduce this rank's gradients of a step and return them."""
        found = gradients(self.rank, step) if found is None else found
        reducer.reduce(found.items(), step)
        return found


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def numbers(here: Here) -> dict[str, Any]:
    """Make some steps with each of SETTINGS; return the results, the final state and the bytes of each step."""
    result: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        reducer, outputs, sent = here.reducer(settings), [], []
        for step in range(STEPS):
            before = reducer.bytes_sent
            outputs.append(here.step(reducer, step))
            sent.append(reducer.bytes_sent - before)
        result[name] = {"outputs": outputs, "state": copied(reducer.state_dict()), "bytes": sent}
    result["peer"] = peer(here)
    result["resumed"] = resumed(here)
    result["not finite"] = not_finite(here)
    result["shared"] = shared(here)
    result["halves"] = halves(here)
    result["16 bit"] = in_16_bit(here)
    result["small"] = small(here)
    result["large"] = large(here)
    result["one by one"] = one_by_one(here)
    result["drawn"] = drawn(here)
    result["refused"] = refused(here)
    alone = [dist.new_group([rank]) for rank in range(RANKS)][here.rank]
    lonely = PowerSgdReducer(SETTINGS["warm"], alone, COLUMNS, shards=NODE_SIZE)
    result["alone"] = {"outputs": here.step(lonely, 0), "bytes": lonely.bytes_sent}
    return result


@dataclass
class Bucket:
    """A stand-in for a bucket of DistributedDataParallel, with the methods that the hook calls."""

    flat: Tensor
    matrices: list[Tensor]

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        return self.matrices

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


def peer(here: Here) -> list[dict[str, Tensor]]:
    """Reduce the matrices with PyTorch's hook for DistributedDataParallel."""
    state = PowerSGDState(
        here.place, matrix_approximation_rank=RANK // NODE_SIZE, start_powerSGD_iter=2, min_compression_rate=1
    )
    names, outputs = ["wide", "tall"], []
    shapes = [torch.Size(SHARDS[name][0]) for name in names]
    state.iter = 2
    state.p_memory_dict[0] = torch.zeros(sum(shape[0] * RANK // NODE_SIZE for shape in shapes))
    state.q_memory_dict[0] = torch.cat([first_factors()[name].flatten() for name in names])
    lengths = [shape.numel() for shape in shapes]
    for step in range(STEPS):
        flat = torch.cat([gradients(here.rank, step)[name].flatten() for name in names])
        matrices = [part.view(shape) for part, shape in zip(flat.split(lengths), shapes, strict=True)]
        powerSGD_hook(state, Bucket(flat, matrices)).wait()
        outputs.append(dict(zip(names, matrices, strict=True)))
    return outputs


def resumed(here: Here) -> dict[str, Any]:
    """Replace the reducer halfway by a new one that loads the state."""
    reducer, outputs = here.reducer(SETTINGS["warm"]), []
    for step in range(STEPS):
        if step == STEPS // 2:
            saved = copied(reducer.state_dict())
            reducer = PowerSgdReducer(SETTINGS["warm"], here.place, COLUMNS, shards=NODE_SIZE, seed=1)
            reducer.load_state_dict(saved)
        outputs.append(here.step(reducer, step))
    return {"outputs": outputs, "state": copied(reducer.state_dict())}


def not_finite(here: Here) -> dict[str, Any]:
    """Give the second node a NaN in "wide" in the third step, of which nothing is sent.

    The step after it is compared with that of a reducer that begins with the errors and gradients that are finite.
    """
    reducer = here.reducer(SETTINGS["warm"])
    for step in range(2):
        here.step(reducer, step)
    before = copied(reducer.state_dict())
    found = gradients(here.rank, 2)
    if here.rank >= NODE_SIZE:
        found["wide"][3, 4] = torch.nan
    broken = here.step(reducer, 2, found)
    after = copied(reducer.state_dict())
    next_step = here.step(reducer, 3)
    left = copied(before)
    for key in [key for key in left if key.startswith("error.")]:
        gradient = gradients(here.rank, 2)[key.removeprefix("error.")].flatten()
        left[key].view(-1)[: len(gradient)] += gradient
    if here.rank >= NODE_SIZE:
        del left["error.wide"]
    fresh = PowerSgdReducer(SETTINGS["warm"], here.place, COLUMNS, shards=NODE_SIZE)
    fresh.load_state_dict(left)
    wanted = here.step(fresh, 3)
    return {"broken": broken, "after": after, "left": left, "next": next_step, "wanted": wanted}


def shared(here: Here) -> dict[str, Any]:
    """Share the errors after some steps, in 32 and 16 bit, and load what was saved into another reducer."""
    result: dict[str, Any] = {}
    for label, kind in {"32 bit": torch.float32, "16 bit": torch.bfloat16}.items():
        reducer = here.reducer(SETTINGS["warm"])
        for step in range(STEPS):
            here.step(reducer, step, {name: value.to(kind) for name, value in gradients(here.rank, step).items()})
        before = copied(reducer.state_dict())
        shards = {name: torch.empty(shape, dtype=kind) for name, (shape, _) in SHARDS.items()}
        saved = {name: value.clone() for name, value in reducer.share_errors(shards)}
        after = copied(reducer.state_dict())
        again = PowerSgdReducer(SETTINGS["warm"], here.place, COLUMNS, shards=NODE_SIZE)
        again.load_state_dict({key: value for key, value in after.items() if key.startswith("factor.")})
        for name, value in saved.items():
            again.load_error(name, value, shards[name])
        result[label] = {"before": before, "saved": saved, "after": after, "loaded": copied(again.state_dict())}
    return result


def halves(here: Here) -> dict[str, Any]:
    """Reduce bfloat16 gradients, the same numbers in float32, a mix of both, and some with a NaN on the second node."""
    rounded = {name: value.bfloat16() for name, value in gradients(here.rank, 0).items()}
    exact = {name: value.float() for name, value in rounded.items()}
    mixed = copied(rounded) | {"tall": exact["tall"].clone()}
    broken = copied(rounded)
    if here.rank >= NODE_SIZE:
        broken["wide"][3, 4] = torch.nan
    reducer, unlucky = here.reducer(SETTINGS["warm"]), here.reducer(SETTINGS["warm"])
    return {"outputs": here.step(reducer, 0, rounded), "exact": here.step(here.reducer(SETTINGS["warm"]), 0, exact),
            "mixed": here.step(here.reducer(SETTINGS["warm"]), 0, mixed), "bytes": reducer.bytes_sent,
            "broken": here.step(unlucky, 0, broken), "after": list(unlucky.state_dict())}  # fmt: skip


def small(here: Here) -> list[dict[str, Tensor]]:
    """Make some steps with bfloat16 gradients that are multiplied by SMALL."""
    reducer, outputs = here.reducer(SETTINGS["warm"]), []
    for step in range(STEPS):
        found = {name: value.bfloat16() * SMALL for name, value in gradients(here.rank, step).items()}
        outputs.append(here.step(reducer, step, found))
    return outputs


def large(here: Here) -> list[Tensor]:
    """Reduce a gradient of rank 1 and size LARGE, more than a 16-bit factor can hold, and then zeros."""
    reducer, outputs = PowerSgdReducer(SETTINGS["warm"], here.place, {"one": 20}, shards=NODE_SIZE), []
    for step in range(4):
        found = torch.zeros(12, 20, dtype=torch.bfloat16)
        if step == 0:
            found[:, 3] = LARGE / 12**0.5
        reducer.reduce([("one", found)], step)
        outputs.append(found)
    return outputs


def in_16_bit(here: Here) -> dict[str, Any]:
    """Make some steps with scaled bfloat16 gradients, and replace the reducer halfway by one that loads the state."""
    reducer, outputs, scales = here.reducer(SETTINGS["warm"]), [], {"wide": 8.0, "tall": 3.0}
    for step in range(STEPS):
        if step == STEPS // 2:
            saved = copied(reducer.state_dict())
            reducer = PowerSgdReducer(SETTINGS["warm"], here.place, COLUMNS, shards=NODE_SIZE)
            reducer.load_state_dict(saved)
        found = {name: (value * scales.get(name, 1.0)).bfloat16() for name, value in gradients(here.rank, step).items()}
        reducer.reduce(found.items(), step, scales)
        outputs.append(found)
    again, undisturbed = here.reducer(SETTINGS["warm"]), []
    for step in range(STEPS):
        found = {name: (value * scales.get(name, 1.0)).bfloat16() for name, value in gradients(here.rank, step).items()}
        again.reduce(found.items(), step, scales)
        undisturbed.append(found)
    return {"scales": scales, "outputs": outputs, "undisturbed": undisturbed, "state": copied(again.state_dict())}


def one_by_one(here: Here) -> dict[str, Any]:
    """Reduce one matrix at a time, at last with a NaN in one of them."""
    together, compression.BATCH_NUMBERS = compression.BATCH_NUMBERS, 1
    reducer = here.reducer(SETTINGS["warm"])
    outputs = [here.step(reducer, step) for step in range(STEPS)]
    state, sent = copied(reducer.state_dict()), reducer.bytes_sent
    found = gradients(here.rank, STEPS)
    if here.rank >= NODE_SIZE:
        found["wide"][3, 4] = torch.nan
    broken = here.step(reducer, STEPS, found)
    compression.BATCH_NUMBERS = together
    return {"outputs": outputs, "state": state, "bytes": sent, "broken": broken, "after": list(reducer.state_dict())}


def drawn(here: Here) -> dict[str, Tensor]:
    """Reduce with the initial factors of two seeds and two names."""
    outputs = {}
    for seed in (0, 1):
        for name in ("wide", "other"):
            reducer = PowerSgdReducer(SETTINGS["fixed"], here.place, {name: 20}, shards=NODE_SIZE, seed=seed)
            found = gradients(here.rank, 0)["wide"]
            reducer.reduce([(name, found)], 0)
            outputs[f"{name} {seed}"] = found
    return outputs


def refused(here: Here) -> list[str]:
    """Return the errors on loading states of other parameters or sizes."""
    errors = []
    for key, shape in {"error.other": (12, 20), "moment.wide": (12, 20), "error.wide": (12, 19)}.items():
        reducer = here.reducer(SETTINGS["warm"])
        try:
            reducer.load_state_dict({key: torch.zeros(shape)})
            here.step(reducer, 0)
        except ValueError as error:
            errors.append(str(error))
    return errors


class In16Bit(PowerSgdReducer):
    """A reducer that gets the gradients of matrices in bfloat16."""

    def reduce(
        self, named: Iterable[tuple[str, Tensor]], update: int, scales: Mapping[str, float] | None = None
    ) -> None:
        found = dict(named)
        halved = {name: gradient.bfloat16() if name in self.columns else gradient for name, gradient in found.items()}
        super().reduce(halved.items(), update, scales)
        for name, gradient in found.items():
            gradient.copy_(halved[name])


def trained_in_16_bit(study: Study, settings: PowerSgd, here: Here) -> dict[str, Any]:
    power_sgd_training.PowerSgdReducer = In16Bit  # type: ignore[misc]
    found = vars(train(study, settings, here.node, here.place))
    power_sgd_training.PowerSgdReducer = PowerSgdReducer  # type: ignore[misc]
    return found


def trained(here: Here) -> dict[str, Any]:
    """Train the tiny prior with each of TRAINED, and with a low rank in 16 bit."""
    found = {name: vars(train(TINY, settings, here.node, here.place)) for name, settings in TRAINED.items()}
    return found | {"16 bit": trained_in_16_bit(TINY, TRAINED["low rank"], here)}


def converged(here: Here) -> dict[str, Any]:
    """Train a larger prior for longer, uncompressed and with low ranks."""
    found = {str(rank): vars(train(LONG, PowerSgd(rank=rank), here.node, here.place)) for rank in (0, 4, 16)}
    return found | {"16 bit": trained_in_16_bit(LONG, PowerSgd(rank=16), here)}


def spread(rank: int, count: int) -> Tensor:
    """Return numbers of ``rank`` from below the smallest of 1-6-9 to above its largest, with zeros of both signs."""
    rng = np.random.default_rng([3, rank, count])
    values = torch.from_numpy(rng.normal(size=count) * 2.0 ** rng.uniform(-75, 6, count)).float()
    values[:: count // 2 + 1] *= 0.0
    return values


def means(here: Here) -> dict[str, Any]:
    """Average the numbers of ``spread`` over 2, 3 and 4 ranks; return what was sent, the mean and the bytes passed."""
    handed: list[int] = []
    exchange = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, group: dist.ProcessGroup) -> None:
        handed.append(given.nbytes)
        exchange(output, given, group=group)

    error_buffers.CHUNK, all_reduce_16bit.dist.all_to_all_single = CHUNK, counting  # type: ignore[attr-defined]
    result: dict[str, Any] = {}
    for nodes in (2, 3, 4):
        group = dist.new_group(list(range(nodes)))
        for count in NUMBERS if here.rank < nodes else ():
            result[f"{nodes} {count}"] = exchanged(spread(here.rank, count), group, handed)
        if here.rank < nodes:
            broken = spread(here.rank, 50)
            if here.rank == nodes - 1:
                broken[10:40:10] = torch.tensor([torch.nan, torch.inf, -torch.inf])
            result[f"{nodes} broken"] = exchanged(broken, group, handed)
    return result


def exchanged(values: Tensor, group: dist.ProcessGroup, handed: list[int]) -> dict[str, Any]:
    sent, mean = torch.empty_like(values), torch.empty_like(values)
    codes = all_reduce_16bit.encode(values, multiple_of=dist.get_world_size(group))
    all_reduce_16bit.decode(codes, sent)
    handed.clear()
    all_reduce_16bit.all_reduce_mean(codes, group)
    all_reduce_16bit.decode(codes, mean)
    return {"sent": sent, "mean": mean, "handed": list(handed)}


SCENARIOS: dict[str, Callable[[Here], dict[str, Any]]] = {
    "numbers": numbers,
    "trained": trained,
    "converged": converged,
    "means": means,
}


def run(rank: int, port: int, scenario: str, folder: Path) -> None:
    """Run a scenario as one of the ranks."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    silence()
    here = Here(rank, *join_nodes())
    torch.save(SCENARIOS[scenario](here), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_scenario(scenario: str, folder: Path, timeout: float = 600) -> list[dict[str, Any]]:
    """Run ``scenario`` on the four ranks and return their results."""
    command = [sys.executable, __file__, scenario, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # By fork, so that torch is imported only once.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, port, scenario, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
