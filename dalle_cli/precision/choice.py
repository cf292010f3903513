"""``precision: auto`` on a CPU: the faster of fp32 and bf16, measured on work of a run's own sizes.

bf16 products are twice as fast on processors that have them, and up to a hundred times slower than fp32 on others. The
share of products in the work depends on its sizes, so a run measures both.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.files import json_text, user_cache, write_json
from dalle_cli.stores.typed import read_typed

ROUNDS = 5
"""Number of times that the work is done and timed in each precision, after once to warm it up."""
PATIENCE = 3.0
"""Factor by which all rounds in bf16 may take longer than those in fp32 before no more are made."""
GAIN = 1.05
"""Factor by which bf16 must be faster to be chosen over the more exact fp32."""

Choosable = Literal["fp32", "bf16"]


def seconds_of(work: Callable[[], None], patience: float = math.inf) -> float:
    """Return the seconds that the work takes, the least of a few rounds; none begins after ``patience`` seconds."""
    times: list[float] = []
    while len(times) <= ROUNDS and sum(times) <= patience:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:] or times)


@dataclass(frozen=True)
class _Choice:
    """A choice in the user's cache, with the seconds that the work took."""

    precision: Choosable
    fp32: float
    bf16: float


def faster_precision(
    key: str, what: str, sizes: dict[str, Any], trial: Callable[[Choosable], Callable[[], None]]
) -> tuple[Choosable, str]:
    """Return the precision that is faster in this process, or that was when it was measured, and the reason.

    The choice is kept in the user's cache, so that a recipe of the same sizes comes to the same bytes whenever it is
    run on the same kind of processor.

    Args:
        key: the recipe's key, such as ``"prior.precision"``, for the log.
        what: the work that is timed, such as ``"an update"``, for the log.
        sizes: all that its time depends on, besides processor, torch and threads.
        trial: returns the work in a precision, ready to be timed.
    """
    name, when = f"{_hash_of(sizes)}.json", "measured on this kind of processor before"
    try:
        choice = read_typed(_Choice, user_cache("precision") / name)
    except (UserError, OSError):
        log(f"{key}: auto times {what} in fp32 and in bf16")
        # One after the other, since a model that just fits leaves no room for a second one.
        fp32 = seconds_of(trial("fp32"))
        bf16 = seconds_of(trial("bf16"), patience=PATIENCE * fp32 * (1 + ROUNDS))
        choice, when = _Choice("bf16" if bf16 * GAIN < fp32 else "fp32", fp32, bf16), "measured now"
        with suppress(UserError, OSError):  # it is measured again where nothing can be kept
            folder = user_cache("precision")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, asdict(choice))
    return choice.precision, f"{what} takes {choice.fp32:.3g} s in fp32, {choice.bf16:.3g} s in bf16, {when}"


def _hash_of(sizes: dict[str, Any]) -> str:
    """Return a hash of the sizes and of what else the time depends on."""
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    machine = {
        "processor": {name: str(value) for name, value in processor.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json_text({**machine, **sizes}).encode()).hexdigest()[:32]
