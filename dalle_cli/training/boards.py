"""Where a run's scalars and pictures are shown: TensorBoard always, Weights & Biases where it is asked for."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dalle_cli.errors import UserError
from dalle_cli.stores.files import explain_os_errors, write_atomically


class Board(Protocol):
    """Takes points of a run that goes on after some updates; what an earlier process gave of later ones is void."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points by name, such as ``train/loss``."""

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """(3, H, W) uint8."""

    def flush(self) -> None:
        """Hand everything on, so that a killed process loses none of it."""

    def close(self) -> None:
        """The process ends."""


class TensorBoard:
    """``out/tensorboard/``. Points after ``start`` updates of earlier processes are voided by a mark it heeds."""

    def __init__(self, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with explain_os_errors(out):
            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        self._writer.add_image(name, picture, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of ``project`` for one folder ``out``, which keeps its id in ``wandb-id``.

    Weights & Biases takes no point back: those that it has already are not sent again (they are the same, since
    updates done again are).

    Args:
        config: what it shows as the run's settings.
    """

    def __init__(self, out: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        file = out / "wandb-id"
        if not file.is_file():
            write_atomically(file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project, name=name, id=file.read_text(), resume="allow", dir=str(out), config=dict(config)
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--wandb {project}: Weights & Biases does not start ({reason}); run wandb login, or set "
                "WANDB_MODE=offline, or leave it out"
            ) from error
        self._next = self._run.step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        self._log(step, {name: self._image(picture.permute(1, 2, 0).numpy())})

    def flush(self) -> None:
        """Its own process has it already."""

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)


def require_wandb(project: str | None) -> None:
    """Refuse a ``project`` where Weights & Biases is not installed, before anything is done."""
    if project is None:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder that it left is not it
        raise UserError(
            f"--wandb {project}: Weights & Biases is not installed; pip install wandb, or leave it out: TensorBoard "
            "and metrics.jsonl have the same figures"
        )
