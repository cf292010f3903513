"""DeepSpeed's ZeRO as an engine: weights, gradients and moments in the host's memory or on NVMe, even with one GPU.

DeepSpeed shards each parameter without regard to its rows, reduces gradients in its backward pass, and updates 32-bit
weights with its own optimizer, 16 bytes a parameter. The stages mean what they mean in ``distributed/fsdp.py``. With
``offload``, the optimizer's part waits outside the GPU (and with stage 3 the weights, in host memory), and DeepSpeed's
Adam for processors makes the updates (Ren et al. 2021, "ZeRO-Offload"; Rajbhandari et al. 2021, "ZeRO-Infinity").

DeepSpeed sees one node as its whole world, by an ``mpu`` object; between nodes, gradients are summed or go through
PowerSGD (``distributed/between_nodes.py``). This file alone knows DeepSpeed, and some of its private attributes: the
range of versions in pyproject.toml is one that the tests passed with.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dalle_cli.config.schema import Adam, PriorSettings, Sharding
from dalle_cli.distributed.between_nodes import BetweenNodes
from dalle_cli.distributed.engine import Optimizer
from dalle_cli.distributed.group import Group, Nodes, form_process_group, split_group
from dalle_cli.errors import UserError
from dalle_cli.precision.adam import adam_groups
from dalle_cli.precision.formats import MOMENTS
from dalle_cli.progress import log
from dalle_cli.stores.tensor_files import Part, Slab

SWAPPED_NUMBERS = 10**8
"""Number of parameters whose weights and moments travel to and from NVMe together."""
STATE_BUFFERS = 4
"""Buffers of SWAPPED_NUMBERS in host memory: for weights, gradients and two moments on their way."""
BUCKET_NUMBERS = 5 * 10**7
"""Most gradients that are reduced together."""
LIVE_NUMBERS = 3 * 10**8
"""Most parameters that ZeRO 3 keeps gathered, those that it fetches ahead included."""


class DecayedModel(Protocol):
    """A model of which some parameters, its matrices, have weight decay and may be compressed by PowerSGD."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See ``nn.Module.named_parameters``."""

    def decayed_parameters(self) -> dict[str, nn.Parameter]:
        """Return the matrices by name."""


@dataclass(frozen=True)
class Work:
    """The work of a rank in an update, which DeepSpeed must know."""

    micro_batch: int
    """Samples in a micro-batch."""
    micro_batches: int
    """Micro-batches in an update."""


@dataclass(frozen=True)
class _Place:
    """The place of this rank's part of a parameter: ``numel`` numbers from ``start`` on of the flattened parameter.

    DeepSpeed holds them in its flat tensor number ``flat``, from ``offset`` on.
    """

    flat: int
    offset: int
    start: int
    numel: int


class DeepSpeedEngine:
    """An engine for ZeRO stages 1, 2 and 3 by DeepSpeed, and its own optimizer.

    Args:
        model: the whole model in 32 bit, the same on each rank; DeepSpeed takes its memory over.
        loss: a module that holds ``model`` and computes the loss in its forward pass.
        stage: the settings of the prior.
        work: the work of this rank in an update.
        seed: the seed of PowerSGD.

    Raises:
        UserError: DeepSpeed cannot be imported or cannot offload to the disk, or nodes start with other weights.
    """

    sharded = True

    def __init__(
        self, model: DecayedModel, loss: nn.Module, nodes: Nodes, stage: PriorSettings, work: Work, seed: int
    ) -> None:
        self.group, self.nodes, self.model = nodes.world, nodes, cast(nn.Module, model)
        self._inside = nodes.inside
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        decayed, sharding = model.decayed_parameters(), stage.sharding
        columns = {name: p.shape[1] for name, p in decayed.items()}
        self.between_nodes = BetweenNodes(nodes, stage.powersgd, columns, seed)
        self.between_nodes.require_same_weights(p.detach() for p in self._parameters.values())
        groups = adam_groups(self._parameters, decayed, stage.adam)
        numbers = sum(shape.numel() for shape in self._shapes.values())
        with _deepspeed(self.group.device) as deepspeed:
            if sharding.offload == "nvme":
                _check_nvme(deepspeed, Path(cast(str, sharding.nvme_path)))
            self._join_alone()
            # DeepSpeed calls PyTorch's collectives by their earlier names in every update.
            names = r"`torch\.distributed\.\w+` is deprecated"
            warnings.filterwarnings("ignore", message=names, category=FutureWarning)
            self.engine, self._zero, *_ = deepspeed.initialize(
                model=loss,
                optimizer=_build_adam(groups, stage.adam, sharding.offload != "none"),
                config=deepspeed_config(sharding, stage.adam, work, self.group.device, numbers),
                mpu=_NodeOfRanks(self.group, self._inside),
            )
        self._stage, self._adam = sharding.zero, self._zero.optimizer
        self._places = {name: self._place(parameter) for name, parameter in self._parameters.items()}
        self._savers = self._choose_savers()
        self._swapped_in: int | None = None
        self._changed = False
        self.own_optimizer: Optimizer | None = DeepSpeedUpdates(self)

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    def read(self, name: str) -> Tensor:
        return self._cut_flat(self.flat(name), name)

    @torch.no_grad()
    def write(self, values: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in values:
            self.read(name).copy_(value.flatten())
            self._changed = True
        self._publish()

    def begin_micro_batch(self, last: bool) -> None:
        self._swap_out()
        self.engine.set_gradient_accumulation_boundary(last)

    def forward(self, loss: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
        return loss(*arguments)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides the sum of gradients by the number of ranks.
        self.engine.backward(loss * self._inside.size, scale_wrt_gas=False)

    def collect_gradients(self, update: int) -> None:
        """Sum the gradients over the nodes; DeepSpeed has summed them inside each.

        If any gradient is not finite, all become NaN, so that DeepSpeed skips the update on every node, and PowerSGD's
        error buffers keep their values.
        """
        if self.nodes.across.size == 1:
            return
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        gradients = {name: safe_get_local_grad(p).clone() for name, p in self._parameters.items()}
        own = {name: gradient[: self._places[name].numel] for name, gradient in gradients.items()}
        finite = all(bool(gradient.isfinite().all()) for gradient in own.values())
        broken = self.group.any(not finite)
        if not broken:
            self.between_nodes.sum(own, update)
        for name, parameter in self._parameters.items():
            if broken:
                gradients[name].fill_(torch.nan)
            safe_set_local_grad(parameter, gradients[name])

    def release_gathered(self) -> None:
        """Do nothing: DeepSpeed releases what it gathers."""

    def slab(self, name: str) -> Slab:
        place, shape = self._places[name], self._shapes[name]
        width = shape[1:].numel()
        first = place.start // width
        return Slab(first, max(first + 1, -(-(place.start + place.numel) // width)))

    def cut(self, name: str, slab: Tensor) -> Tensor:
        place, width = self._places[name], self._shapes[name][1:].numel()
        return slab.flatten().narrow(0, place.start % width if place.numel else 0, place.numel)

    def part_to_save(self, name: str, value: Tensor) -> Part | None:
        """Gather a whole tensor, which one rank of the first node saves; each saves about as much."""
        if not self.nodes.across.leads:
            return None
        whole = self._gather(name, value)
        return Part(whole.view(self._shapes[name]), 0, tuple(self._shapes[name])) if whole is not None else None

    def require_same_weights(self) -> None:
        self.between_nodes.require_same_weights(map(self.read, self.names))

    def share_errors(self) -> Iterator[tuple[str, Tensor]]:
        return self.between_nodes.share_errors(self._parts()) if self.between_nodes.compresses else iter(())

    def load_errors(self, saved: Iterable[tuple[str, Tensor]]) -> None:
        if self.between_nodes.compresses:
            self.between_nodes.load_errors(saved, self._parts())

    def rank_state(self) -> dict[str, Tensor]:
        return self.between_nodes.state()

    def load_rank_state(self, state: Mapping[str, Tensor] | None) -> None:
        if self.between_nodes.compresses:
            self.between_nodes.load_state(state, self._parts())

    def traffic(self) -> dict[str, int]:
        """Return the bytes sent to other nodes, if there are any; those inside the node are DeepSpeed's."""
        counted = self.between_nodes.traffic()
        return {name: count for name, count in counted.items() if name == "bytes_between_nodes"}

    def flat(self, name: str) -> Tensor:
        """Return DeepSpeed's flat 32-bit tensor that has this rank's part of a parameter, read from NVMe if needed."""
        place = self._places[name]
        if self._swaps(place.flat) and self._swapped_in != place.flat:
            self._swap_out()
            self._zero._optimizer_states_and_gradient_swap_in(place.flat)
            self._swapped_in, self._changed = place.flat, False
        return self._flats[place.flat]

    def moments(self, name: str) -> dict[str, Any]:
        """Return the optimizer's state of this rank's part of a parameter, as views; empty before the first update."""
        flat = self.flat(name)
        state = self._adam.state.get(flat, {})
        return {
            key: self._cut_flat(value, name) if torch.is_tensor(value) and value.dim() else value
            for key, value in state.items()
        }

    def start_moments(self, name: str, step: int) -> None:
        """Begin the state of the flat tensor that has this parameter, as after ``step`` updates, unless it has one."""
        flat = self.flat(name)
        self._changed = True
        state = self._adam.state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
        fused = isinstance(self._adam, torch.optim.AdamW)
        state["step"] = torch.tensor(float(step), device=flat.device) if fused else step

    def _parts(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.names}

    @property
    def _flats(self) -> list[Tensor]:
        names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        return cast(list[Tensor], getattr(self._zero, names[self._stage == 3]))

    def _place(self, parameter: nn.Parameter) -> _Place:
        if self._stage == 3:
            flat, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = min(self._inside.rank * padded, cast(Any, parameter).ds_numel)
            return _Place(flat, offset, start, min(padded, cast(Any, parameter).ds_numel - start))
        found = cast(Any, parameter)._hp_mapping
        if found is None:
            return _Place(0, 0, 0, 0)
        held, own = found.hp_fragment_address, found.lp_fragment_address
        return _Place(found.param_group_index, held.start, own.start, own.numel)

    def _cut_flat(self, flat: Tensor, name: str) -> Tensor:
        place = self._places[name]
        return flat.detach().narrow(0, place.offset, place.numel)

    def _swaps(self, flat: int) -> bool:
        return self._stage == 3 and bool(self._zero._swappable_optimizer_subgroup(flat))

    def _swap_out(self) -> None:
        """Send what ``flat`` swapped in back to NVMe if it was changed, else drop it."""
        if self._swapped_in is None:
            return
        if self._changed:
            self._zero._reassign_or_swap_out_partitioned_parameters(self._swapped_in)
            self._zero._optimizer_states_and_gradient_swap_out(self._swapped_in)
        else:
            self._zero._release_swap_buffers(self._swapped_in)
        self._swapped_in = None

    def _publish(self) -> None:
        """Copy the 32-bit weights to those that the model computes with, on all ranks of the node."""
        self._swap_out()
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for flat in range(len(self._flats)):
            if not self._swaps(flat):
                self._zero._reassign_or_swap_out_partitioned_parameters(flat)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _gather(self, name: str, value: Tensor) -> Tensor | None:
        """Return the whole flattened tensor of which ``value`` is this rank's part; None on all ranks but its saver."""
        if self._inside.size == 1:
            return value.clone() if self._swaps(self._places[name].flat) else value
        place = self._places[name]
        whole = torch.zeros(self._shapes[name].numel(), device=self.group.device, dtype=value.dtype)
        whole.narrow(0, place.start, place.numel).copy_(value)
        whole = self._inside.sum(whole)
        return whole.to(value.device) if self._savers[name] == self._inside.rank else None

    def _choose_savers(self) -> dict[str, int]:
        """Return the rank of the node that saves each parameter; consecutive ones share the numbers evenly."""
        total, before, savers = sum(shape.numel() for shape in self._shapes.values()), 0, {}
        for name, shape in self._shapes.items():
            savers[name] = before * self._inside.size // total
            before += shape.numel()
        return savers

    def _join_alone(self) -> None:
        """Form a process group for a process that no launcher started."""
        os.environ.setdefault("LOCAL_RANK", "0")
        if not dist.is_initialized():
            form_process_group(self.group.device, store=HashStore(), rank=0, world_size=1)


class DeepSpeedUpdates:
    """DeepSpeed's optimizer: it clips by the global norm and skips an update whose gradients are not finite."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.skipped_updates = 0

    def zero_grad(self) -> None:
        """Do nothing: DeepSpeed drops gradients after each update."""

    def step(self, rate: float) -> dict[str, Tensor]:
        engine = self.engine.engine
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        engine.step()
        skipped = bool(engine.optimizer.overflow)
        self.skipped_updates += skipped
        logged = {
            "grad_norm": float(engine.get_global_grad_norm()),
            "skipped": float(skipped),
            "skipped_updates": float(self.skipped_updates),
        }
        return {name: torch.tensor(value) for name, value in logged.items()}

    def moments(self, name: str) -> dict[str, Tensor]:
        found = self.engine.moments(name)
        if "step" in found:
            found["step"] = torch.tensor(float(found["step"]))
        return found

    @torch.no_grad()
    def load_moments(self, moments: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        for name, values in moments:
            self.engine.start_moments(name, int(values["step"]))
            held = self.engine.moments(name)
            for key, form in MOMENTS.items():
                value = values[key]
                held[key].copy_(form.decode(value) if value.dtype == torch.uint16 else value)

    def trainer_state(self) -> dict[str, Any]:
        return {"skipped_updates": self.skipped_updates}

    def load_trainer_state(self, state: Mapping[str, Any]) -> None:
        self.skipped_updates = state.get("skipped_updates", 0)


def deepspeed_config(sharding: Sharding, adam: Adam, work: Work, device: torch.device, numbers: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a recipe's settings and a model of ``numbers`` parameters."""
    zero: dict[str, Any] = {
        "stage": sharding.zero,
        "overlap_comm": False,  # it would take a second bucket
        "reduce_bucket_size": min(BUCKET_NUMBERS, numbers),
        "allgather_bucket_size": BUCKET_NUMBERS,
        "stage3_max_live_parameters": LIVE_NUMBERS,
        "stage3_max_reuse_distance": LIVE_NUMBERS,
    }
    pin = {"pin_memory": device.type == "cuda"}
    if sharding.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", **pin}
    elif sharding.offload == "nvme":
        disk = {"device": "nvme", "nvme_path": sharding.nvme_path, "buffer_count": STATE_BUFFERS}
        zero["offload_optimizer"] = {**disk, **pin}
        zero["sub_group_size"] = SWAPPED_NUMBERS
    if sharding.offload != "none" and sharding.zero == 3:
        # The weights to compute with stay in host memory: swapping them too fails in DeepSpeed 0.19.8.
        zero["offload_param"] = {"device": "cpu", **pin}
    return {
        "train_micro_batch_size_per_gpu": work.micro_batch,
        "gradient_accumulation_steps": work.micro_batches,
        "gradient_clipping": adam.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def refuse_few_stages(sharding: Sharding, nodes: int) -> None:
    """Raise UserError if gradients are to be summed between ``nodes`` under a ZeRO stage that does not shard weights.

    Only stage 3 lets a rank read and write its part of a gradient between the backward pass and the update.
    """
    if sharding.engine == "deepspeed" and nodes > 1 and sharding.zero < 3:
        raise UserError(
            f"prior.sharding.zero: several nodes under DeepSpeed need stage 3, not {sharding.zero}; set 3, or "
            "prior.sharding.engine to fsdp"
        )


@contextmanager
def _deepspeed(device: torch.device) -> Iterator[Any]:
    """Import DeepSpeed and keep what it prints out of stdout, which is for pipes.

    Raises:
        UserError: it cannot be imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    with redirect_stdout(sys.stderr):
        try:
            import deepspeed
        except Exception as error:  # it probes compilers and drivers, which may fail in any way
            raise UserError(
                f"prior.sharding.engine: deepspeed cannot be imported ({error}); pip install deepspeed, on Linux, or "
                "set it to fsdp"
            ) from error
        for handler in logging.getLogger("DeepSpeed").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute's compilation for what gloo does too
        yield deepspeed


def _check_nvme(deepspeed: Any, folder: Path) -> None:
    """Raise UserError if DeepSpeed cannot offload to ``folder``."""
    if not folder.is_dir():
        raise UserError(f"prior.sharding.nvme_path: {folder}: there is no such folder; make it on a fast disk")
    if not deepspeed.ops.__compatible_ops__.get("async_io"):
        raise UserError(
            "prior.sharding.offload: nvme needs libaio, which DeepSpeed does not find; install libaio-dev (Debian, "
            "Ubuntu) or libaio-devel, or set offload to cpu"
        )


def _build_adam(groups: list[dict[str, Any]], adam: Adam, offloaded: bool) -> torch.optim.Optimizer:
    """Return DeepSpeed's Adam for processors if the moments are ``offloaded`` and it compiles here, else torch's."""
    settings: dict[str, Any] = {"lr": 0.0, "betas": (adam.beta1, adam.beta2), "eps": adam.eps}
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return cast(torch.optim.Optimizer, DeepSpeedCPUAdam(groups, adamw_mode=True, **settings))
        except Exception as error:  # of a compiler, which may be missing
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log(f"train-prior: DeepSpeed's Adam for processors does not compile here ({reason[0]}); torch's is used")
    return torch.optim.AdamW(groups, fused=True, **settings)


class _NodeOfRanks:
    """An ``mpu`` for DeepSpeed: the ranks of a node are its data-parallel ones, and no model is split otherwise."""

    def __init__(self, world: Group, inside: Group) -> None:
        self._inside = inside
        self._alone = split_group(world, [[rank] for rank in range(world.size)]).process_group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._inside.process_group

    def get_data_parallel_rank(self) -> int:
        return self._inside.rank

    def get_data_parallel_world_size(self) -> int:
        return self._inside.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1
