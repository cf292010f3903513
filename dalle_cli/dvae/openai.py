"""Import of OpenAI's released dVAE, two pickled modules (encoder.pkl and decoder.pkl), as a checkpoint.

The published classes are never imported. Each module's name, class and constants and each parameter's shape are
compared with our ``DVAE`` before any values are read, so that a file of another architecture is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dalle_cli.config.schema import (
    ClipModel,
    ClipSettings,
    DvaeModel,
    DvaeObjective,
    DvaeSettings,
    PriorModel,
    PriorSettings,
    Recipe,
)
from dalle_cli.dvae.inert_pickle import Instance, dotted, shown
from dalle_cli.dvae.model import CHANNELS, DVAE, Conv2d, Decoder, Encoder, Resblock
from dalle_cli.dvae.torch_file import VALUE_BYTES, StoredTensor, open_torch_file, read_tensors
from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.checkpoint import (
    Checkpoint,
    CheckpointContent,
    CheckpointFacts,
    open_checkpoint,
    save_checkpoint,
)
from dalle_cli.stores.files import owned, sha256_file

DOWNSAMPLING = 8
"""Downsampling of the released dVAE."""
COUNTERPARTS: dict[type[nn.Module], frozenset[str]] = {
    Encoder: frozenset({"dall_e.encoder Encoder"}),
    Decoder: frozenset({"dall_e.decoder Decoder"}),
    Resblock: frozenset({"dall_e.encoder EncoderBlock", "dall_e.decoder DecoderBlock"}),
    Conv2d: frozenset({"dall_e.utils Conv2d"}),
    nn.Sequential: frozenset({"torch.nn.modules.container Sequential"}),
    nn.ReLU: frozenset({"torch.nn.modules.activation ReLU"}),
    nn.Identity: frozenset({"torch.nn.modules.linear Identity"}),
    nn.MaxPool2d: frozenset({"torch.nn.modules.pooling MaxPool2d"}),
    nn.Upsample: frozenset({"torch.nn.modules.upsampling Upsample"}),
}
"""Published counterparts of our classes, written "module name"."""
CLASSES: frozenset[str] = frozenset().union(*COUNTERPARTS.values())
"""Allowlist of the classes that a file may name."""

LOGIT_LAPLACE_EPS = 0.1
MAX_BLOCKS = 64
MAX_SIZE = 65535
"""Upper bounds of the sizes in a file, so that a wrong one cannot demand a huge network."""


@dataclass(frozen=True)
class ReleasedDvae:
    """A released dVAE in the form of our ``DVAE``."""

    settings: DvaeModel
    weights: dict[str, Tensor]
    """Float32 parameters by the names of our ``DVAE``."""


def import_dvae(encoder: Path, decoder: Path, out: Path, image_size: int) -> Checkpoint:
    """Save the released dVAE, encoder.pkl and decoder.pkl, as the checkpoint ``out``, with equal raw and EMA weights.

    ``image_size`` is the side to which users of the checkpoint crop images; the network itself takes any size.

    Raises:
        UserError: ``out`` is not empty, another process is writing it, a file is refused, the two do not belong
            together, or the size is not a multiple of 8.
    """
    if image_size % DOWNSAMPLING:
        raise UserError(f"--image-size {image_size} is not a multiple of {DOWNSAMPLING}; choose one, such as 256")
    with owned(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: already exists; name a new folder")
        released = read_released(encoder, decoder)
        imported = {file.name: sha256_file(file) for file in (encoder, decoder)}
        content = CheckpointContent({"raw": released.weights, "ema": released.weights}, {}, {"imported": imported})
        save_checkpoint(out, CheckpointFacts("dvae", 0, _recipe(released.settings, image_size), {}, {}), content)
        return open_checkpoint(out, "dvae")


def read_released(encoder: Path, decoder: Path) -> ReleasedDvae:
    """Read the sizes and weights of a released dVAE.

    Raises:
        UserError: a file is damaged, refused or of another architecture, or the two do not belong together.
    """
    with open_torch_file(encoder, CLASSES) as encoder_file, open_torch_file(decoder, CLASSES) as decoder_file:
        roots = {"encoder": _Module(encoder_file.root, encoder), "decoder": _Module(decoder_file.root, decoder)}
        _refuse_other_roots(roots["encoder"], roots["decoder"])
        settings = _settings(roots["encoder"], roots["decoder"])
        with torch.device("meta"):
            model = DVAE(settings)
        weights: dict[str, Tensor] = {}
        for name, ours, file in (("encoder", model.encoder, encoder_file), ("decoder", model.decoder, decoder_file)):
            stored = _parameters(roots[name], ours)
            log(f"{roots[name].file}: the {name}, {sum(tensor.numel for tensor in stored.values()):,} parameters")
            for parameter, values in read_tensors(file, stored):
                if not bool(values.isfinite().all()):
                    roots[name].refuse(f"{parameter} has values that are not finite")
                weights[f"{name}.{parameter}"] = values
    return ReleasedDvae(settings, weights)


class _Module:
    """A module of the file, with its class ``kind``, its attributes ``state`` and its dotted ``path``."""

    def __init__(self, value: object, file: Path, path: str = "") -> None:
        self.file, self.path, self.value = file, path, value
        self.kind = value.kind if isinstance(value, Instance) else ""
        self.state = (value.state or {}) if isinstance(value, Instance) else {}

    def part(self, attribute: str) -> dict[str, object]:
        """Return the dictionary ``_modules``, ``_parameters`` or ``_buffers``."""
        part = self.state.get(attribute)
        if type(part) is not dict:
            self.refuse(f"{self.path or 'its module'} has no {attribute}")
        return part

    def below(self, name: str, value: object) -> _Module:
        return _Module(value, self.file, f"{self.path}.{name}" if self.path else name)

    def refuse(self, why: str) -> NoReturn:
        raise UserError(f"{self.file}: {why}; it is damaged, or not OpenAI's dVAE")


def _refuse_other_roots(encoder: _Module, decoder: _Module) -> None:
    (encoder_kind,), (decoder_kind,) = COUNTERPARTS[Encoder], COUNTERPARTS[Decoder]
    if encoder.kind == decoder_kind and decoder.kind == encoder_kind:
        raise UserError(
            f"{encoder.file} is the decoder and {decoder.file} the encoder: they are swapped; "
            "give the encoder first, then the decoder"
        )
    for module, kind, role in ((encoder, encoder_kind, "encoder"), (decoder, decoder_kind, "decoder")):
        if module.kind in (encoder_kind, decoder_kind) and module.kind != kind:
            raise UserError(f"{module.file}: holds {dotted(module.kind)} where the {role} is needed; name {role}.pkl")
        if module.kind != kind:
            module.refuse(f"holds {shown(module.value)} where {dotted(kind)} is needed")


def _settings(encoder: _Module, decoder: _Module) -> DvaeModel:
    """Return the sizes that both modules state; sizes not stated are the published ones, our defaults."""
    names = {"n_hid": "n_hid", "blocks_per_group": "n_blk_per_group", "codebook_size": "vocab_size"}
    sizes = {ours: _size(encoder, ours, theirs) for ours, theirs in names.items()}
    for ours, theirs in names.items():
        other = _size(decoder, ours, theirs)
        if other != sizes[ours]:
            raise UserError(
                f"{encoder.file} has {theirs} {sizes[ours]}, {decoder.file} has {other}: they are of different dVAEs; "
                "give two files of one release"
            )
    for module, name in ((encoder, "input_channels"), (decoder, "output_channels")):
        if (channels := module.state.get(name, CHANNELS)) != CHANNELS:
            module.refuse(f"{name} is {shown(channels)}, not {CHANNELS}")
    try:
        return DvaeModel(**sizes, n_init=_size(decoder, "n_init", "n_init"))
    except ValidationError as error:
        encoder.refuse(f"its sizes are not those of a dVAE ({error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']})")


def _size(module: _Module, ours: str, theirs: str) -> int:
    size = module.state.get(theirs, DvaeModel.model_fields[ours].default)
    largest = MAX_BLOCKS if ours == "blocks_per_group" else MAX_SIZE
    if type(size) is not int or not 1 <= size <= largest:
        module.refuse(f"{theirs} is {shown(size)}, not a whole number from 1 to {largest}")
    return size


def _parameters(root: _Module, ours: nn.Module) -> dict[str, StoredTensor]:
    """Return the file's tensors by our parameters' names, after comparing every module and shape."""
    found: dict[str, StoredTensor] = {}
    _compare(root, ours, found)
    if sum(tensor.numel for tensor in found.values()) * VALUE_BYTES > root.file.stat().st_size:
        root.refuse("its parameters are larger than the file")
    return found


def _compare(theirs: _Module, ours: nn.Module, found: dict[str, StoredTensor]) -> None:
    where = theirs.path or "its module"
    if theirs.kind not in COUNTERPARTS[type(ours)]:
        theirs.refuse(f"{where} is {shown(theirs.value)} where our dVAE has {type(ours).__name__}")
    for name, constant in _constants(ours).items():
        if (given := theirs.state.get(name)) != constant:
            theirs.refuse(f"{where}.{name} is {shown(given)} where our dVAE has {constant!r}")
    parameters, children = theirs.part("_parameters"), theirs.part("_modules")
    _compare_names(theirs, list(parameters), [name for name, _ in ours.named_parameters(recurse=False)])
    _compare_names(theirs, list(theirs.part("_buffers")), [])
    _compare_names(theirs, list(children), [name for name, _ in ours.named_children()])
    for name, parameter in ours.named_parameters(recurse=False):
        path, stored = f"{theirs.path}.{name}", parameters[name]
        if not isinstance(stored, StoredTensor):
            theirs.refuse(f"{path} is {shown(stored)}, not a tensor")
        if stored.shape != tuple(parameter.shape):
            theirs.refuse(f"{path} has shape {stored.shape}, a dVAE of its sizes has {tuple(parameter.shape)}")
        found[path] = stored
    for name, child in ours.named_children():
        _compare(theirs.below(name, children[name]), child, found)


def _compare_names(theirs: _Module, given: list[str], expected: list[str]) -> None:
    if given != expected:
        written = ", ".join(given)[:200] or "nothing"
        theirs.refuse(f"{theirs.path or 'its module'} has {written!r} where our dVAE has {', '.join(expected)!r}")


def _constants(ours: nn.Module) -> dict[str, object]:
    """Return the constants that determine what a module computes, by their names in the published classes."""
    names: tuple[str, ...] = ()
    match ours:
        case Resblock():
            return {"post_gain": ours.post_gain}
        case Conv2d():
            return {"kw": ours.w.shape[-1]}
        case nn.MaxPool2d():
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        case nn.Upsample():
            names = ("size", "scale_factor", "mode")
    return {name: getattr(ours, name) for name in names}


def _recipe(settings: DvaeModel, image_size: int) -> Recipe:
    return Recipe(
        name="openai-dvae",
        description="OpenAI's released dVAE, imported",
        image_size=image_size,
        dvae=DvaeSettings(model=settings, objective=DvaeObjective(logit_laplace_eps=LOGIT_LAPLACE_EPS)),
        # The other stages are unused, but must be valid for the image size.
        prior=PriorSettings(model=PriorModel(grid=image_size // DOWNSAMPLING)),
        clip=ClipSettings(model=ClipModel(patch_size=DOWNSAMPLING)),
    )
