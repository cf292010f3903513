"""AdamW with 16-bit moments and 16-bit parameters (paper, section 2.4 and appendices B.2 and D).

Parameters in float16 or bfloat16 have no 32-bit copy: an update is computed in 32 bit and rounded stochastically. Late
in training most updates are below half the distance between neighbouring 16-bit numbers. Rounding to nearest would lose
every one of them; stochastic rounding loses none on average. The moments are rounded the same way, so that they can
follow slow averages too (with beta2 = 0.999 an update moves less than a mantissa's last bit). The noise is a function
of (seed, the parameter's place among the groups, the number of its updates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_cli.config.schema import Adam
from dalle_cli.precision.formats import MEAN, VARIANCE, round_stochastically
from dalle_cli.randomness import torch_generator
from dalle_cli.transfers import OnItsWay

MAX_VARIANCE = 5.0
"""Maximum of the running variance, which is clipped before it is used (paper, appendix B.2)."""
CHUNK = 2**22
"""Number of values updated at once, which bounds the memory of the 32-bit intermediates."""


def adam_groups(named: Mapping[str, torch.nn.Parameter], decayed: Collection[str], adam: Adam) -> list[dict[str, Any]]:
    """Return an optimizer's groups: the parameters with weight decay, then those without it."""
    matrices = {"params": [p for name, p in named.items() if name in decayed], "weight_decay": adam.weight_decay}
    others = {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0}
    return [matrices, others]


class Adam16(torch.optim.Optimizer):
    """AdamW, optionally with moments in 16 bit. The moments are those of the unscaled gradients.

    Args:
        params: contiguous parameters in float32, float16 or bfloat16, or groups of them.
        betas: decays of the running mean and variance; the paper's by default.
        packed: store each moment in 2 bytes a parameter (the formats 1-6-9 and 0-6-10) instead of 4.
        seed: seed of the noise of stochastic rounding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        packed: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "packed": packed})
        self.seed = seed
        self._unsettled: tuple[list[Tensor], OnItsWay] | None = None
        """The parameters that the newest step has counted, with their factors, which may turn out to be 0."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, factors: Mapping[Tensor, Tensor | float] | None = None
    ) -> float | None:
        """Update the parameters that have gradients, each gradient times its factor (1 by default) in 32 bit.

        A parameter whose factor is 0 stays as it is, and so do its moments, even if its gradient is not finite. A
        factor that only a GPU knows is a scalar on that GPU, for which the host does not wait. It counts the update in
        the parameter's ``step``, and ``settle`` takes that back if the factor was 0.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.settle()
        uncertain: dict[Tensor, Tensor] = {}
        for place, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                factor = 1.0 if factors is None else factors.get(parameter, 1.0)
                if isinstance(factor, Tensor):
                    uncertain[parameter] = factor
                elif factor == 0:
                    continue
                self._update(parameter, parameter.grad, factor, group, (place, index))
        if uncertain:
            self._unsettled = list(uncertain), OnItsWay.of(torch.stack(list(uncertain.values())))
        return loss

    def settle(self) -> None:
        """Correct the counts ``step`` after the newest update; this may wait for a GPU.

        Each step settles the one before it, whose factors have arrived by then. Call this before reading ``state``.
        """
        if self._unsettled is not None:
            (parameters, factors), self._unsettled = self._unsettled, None
            for parameter, factor in zip(parameters, factors.read(), strict=True):
                if factor == 0:
                    self.state[parameter]["step"] -= 1

    def state_dict(self) -> dict[str, Any]:
        """Return the settled state."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, with the moments in their saved types; the base class would cast them to the parameters'."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    state = state_dict["state"][key]
                    self.state[parameter] = {name: value.to(parameter.device) for name, value in state.items()}

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        factor: Tensor | float,
        group: dict[str, Any],
        place: tuple[int, int],
    ) -> None:
        state, kind = self.state[parameter], torch.uint16 if group["packed"] else torch.float32
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(parameter.shape, dtype=kind, device=parameter.device)
        step = int(state["step"]) + 1
        state["step"] = torch.tensor(float(step))
        generator = torch_generator(self.seed, "adam", *place, step, device=parameter.device)
        tensors = (parameter.view(-1), gradient.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        for w, g, m, v in zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True):
            _advance(w, g, m, v, group, factor, step, generator)


def _advance(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    variance: Tensor,
    group: dict[str, Any],
    factor: Tensor | float,
    step: int,
    generator: torch.Generator,
) -> None:
    """Update flat tensors in place, unless ``factor`` is 0."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    used = factor != 0 if isinstance(factor, Tensor) else None

    def noise() -> Tensor:
        return torch.empty(len(parameter), dtype=torch.int32, device=parameter.device).random_(generator=generator)

    g = gradient.float() * factor
    if group["packed"]:
        m, v = MEAN.decode(mean), VARIANCE.decode(variance)
    else:
        m, v = (mean, variance) if used is None else (mean.clone(), variance.clone())
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2).clamp_(max=MAX_VARIANCE)
    _replace(mean, MEAN.encode(m, noise()) if group["packed"] else m, used)
    _replace(variance, VARIANCE.encode(v, noise()) if group["packed"] else v, used)
    w = parameter.to(torch.float32, copy=used is not None)
    w.mul_(1 - rate * group["weight_decay"])
    root = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    w.addcdiv_(m, root, value=-rate / (1 - beta1**step))
    rounded = w if parameter.dtype == torch.float32 else round_stochastically(w, parameter.dtype, noise())
    _replace(parameter, rounded, used)


def _replace(old: Tensor, new: Tensor, used: Tensor | None) -> None:
    """Write ``new`` into ``old``, if ``used`` says so or is None."""
    if used is None:
        old.copy_(new)
    elif old.dtype == torch.uint16:  # for which torch has few operations
        _replace(old.view(torch.int16), new.view(torch.int16), used)
    else:
        torch.where(used, new, old, out=old)
