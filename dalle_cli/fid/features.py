"""Features of pictures, and their cache: Inception-v3's, as in published figures, a CLIP's, or a network's of timm.

All are torch-fidelity feature extractors, so the same code computes the metrics on either.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from dalle_cli.clip.scorer import Scorer
from dalle_cli.clip.scoring import load_scorer
from dalle_cli.errors import UserError
from dalle_cli.fid.figures import ScoreName
from dalle_cli.fid.pictures import BlurredPictures, Pictures, PictureSubset, explain_broken
from dalle_cli.pretrained import PretrainedFeatures, weights_hash
from dalle_cli.progress import Progress
from dalle_cli.stores.files import sha256_file, write_atomically

INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]
INCEPTION_SHA256 = INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[-1]
"""The published weights carry the first digits of their sha256 in their name."""

CACHE_FORMAT = 1
CHUNK = 1024
"""Number of pictures whose features are extracted and cached together."""


@dataclass(frozen=True)
class Features:
    """A feature extractor, and the names of its layers."""

    name: str
    """Name of the features, for outputs."""
    extractor: FeatureExtractorBase
    vector: str
    """Layer for FID, KID, precision and recall."""
    logits: str | None
    """Layer of class logits, for the Inception Score; None if there is none."""
    score_name: ScoreName
    device: torch.device
    identity: str
    """Hash of weights, classes and preprocessing, for the cache."""
    warnings: list[str] = field(default_factory=list)

    def extract(self, pictures: Dataset[Tensor], *, batch_size: int = 64, workers: bool = False) -> Extracted:
        """Return the features of (3, H, W) uint8 pictures of one size; ``workers`` decodes in a few processes.

        Raises:
            UserError: a picture is missing or broken.
        """
        try:
            with warnings.catch_warnings():
                # torch-fidelity may start more workers than there are cores, which is harmless: they only decode.
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                layers = get_featuresdict_from_dataset(
                    pictures, self.extractor, batch_size, self.device.type == "cuda", not workers, False
                )
        except UserError as error:
            # A worker's error contains its traceback; the message is the last line.
            first = str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]
            raise UserError(explain_broken(pictures) or first) from error
        return Extracted(layers[self.vector], None if self.logits is None else layers[self.logits])


@dataclass(frozen=True)
class Extracted:
    """``vectors`` (n, d) float32 and class ``logits`` (n, classes) of n pictures, on the CPU."""

    vectors: Tensor
    logits: Tensor | None

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, rows: NDArray[np.int64] | Sequence[int]) -> Extracted:
        """Return the features of some of the pictures."""
        index = torch.as_tensor(rows)
        return Extracted(self.vectors[index], None if self.logits is None else self.logits[index])


@dataclass(frozen=True)
class CachedFeatures:
    """Features of ``count`` pictures, which stay in the files of the cache until they are asked for."""

    files: list[Path]
    """Files of CHUNK pictures each."""
    count: int

    def __len__(self) -> int:
        return self.count

    def rows(self, rows: NDArray[np.int64]) -> Extracted:
        """Read the features of some of the pictures.

        Raises:
            UserError: another process has removed a file from the cache.
        """
        chunks, places = np.divmod(rows, CHUNK)
        layers: dict[str, Tensor] = {}
        for number in np.unique(chunks):
            here = np.flatnonzero(chunks == number)
            for name, part in _read(self.files[number], places[here]).items():
                layers.setdefault(name, part.new_empty(len(rows), part.shape[1]))[torch.as_tensor(here)] = part
        return Extracted(layers["vectors"], layers.get("logits"))

    def whole(self) -> Extracted:
        """Read the features of all pictures; see ``rows``."""
        return self.rows(np.arange(self.count))


def inception(weights_path: Path | None = None, *, device: str = "cpu") -> Features:
    """Return torch-fidelity's port of Inception-v3 from the TensorFlow graph of the published FID.

    Without ``weights_path``, its weights are taken from torch's hub folder, or else downloaded.

    Raises:
        UserError: the file is missing and cannot be downloaded, or does not hold this network's weights.
    """
    path = weights_path if weights_path is not None else _downloaded_inception()
    state = _state_dict(path)
    digest = sha256_file(path)
    published = digest.startswith(INCEPTION_SHA256)
    # torch-fidelity would unpickle arbitrary objects from the file, so it gets a copy of the safely read tensors.
    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    try:
        extractor = create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            cuda=device.startswith("cuda"),
            feature_extractor_weights_path=checked,
            verbose=False,
        )
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit torch-fidelity's Inception-v3; provide the file {INCEPTION_FILE}"
        ) from error
    return Features(
        name=f"inception-v3-compat sha256:{digest[:12]}",
        extractor=extractor,
        vector="2048",
        logits="logits_unbiased",
        score_name="inception_score",
        device=torch.device(device),
        identity=digest,
        warnings=[]
        if published
        else [f"{path.name} is not the published {INCEPTION_FILE}: figures are not comparable with published ones"],
    )


def clip_features(
    scorer: Scorer, class_captions: Sequence[str] = (), *, device: torch.device | str = "cpu"
) -> Features:
    """Return the image features of a CLIP; FID and KID on them are not comparable with Inception's.

    A feature is the scorer's unit vector times sqrt(d). So KID's kernel (x.y / d + 1)^3 is (cosine + 1)^3 at any d.
    With two or more ``class_captions``, a picture's class logits are its scaled similarities to them (zero-shot
    classification); the Inception Score's formula on these is called ``clip_is``.
    """
    if len(class_captions) == 1:
        raise ValueError("one class has no distribution: give two or more class captions, or none")
    layers = ["vector", "logits"] if class_captions else ["vector"]
    return Features(
        name=f"clip-image {scorer.name}",
        extractor=ClipExtractor(scorer, layers, class_captions),
        vector="vector",
        logits="logits" if class_captions else None,
        score_name="clip_is",
        device=torch.device(device),
        identity=hashlib.sha256(json.dumps([scorer.identity, *class_captions]).encode()).hexdigest(),
    )


class ClipExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """A scorer as a torch-fidelity extractor with layers ``vector`` (B, d) and ``logits`` (B, classes)."""

    def __init__(self, scorer: Scorer, layers: Sequence[str], class_captions: Sequence[str] = ()) -> None:
        super().__init__("clip-image", list(layers))
        self.scorer = scorer
        self.classes = scorer.text_features(list(class_captions)) if class_captions else None

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        unit = self.scorer.image_features(pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        layers = {"vector": unit * unit.shape[1] ** 0.5}
        if self.classes is not None:
            layers["logits"] = self.scorer.logit_scale * unit @ self.classes.T
        return tuple(layers[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "vector", "logits"


def named_features(
    clip: str | None, pretrained: str | None, network: str | None, classes: Sequence[str], device: torch.device
) -> Features:
    """Return the features of ``clip``, with ``classes`` for a score, or else of timm's ``network``.

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    if clip is None:
        return network_features(cast(str, network), device=device)
    scorer = load_scorer(clip, pretrained, None, beside=Path(clip), device=device)
    return clip_features(scorer, classes, device=device)


def network_features(name: str, *, device: torch.device | str = "cpu") -> Features:
    """Return the features that the classifier of a pretrained network of timm sees; see ``create_network``.

    Pictures are resized to the network's own input. FID and KID on them are not comparable with Inception's.

    Raises:
        UserError: there is no such network, or its weights cannot be had.
    """
    network = PretrainedFeatures(name).to(device)
    network.size = network.native_size
    digest = weights_hash(network, str(network.size))
    return Features(
        name=f"{name} sha256:{digest[:12]}",
        extractor=NetworkExtractor(network),
        vector="vector",
        logits=None,
        score_name="inception_score",
        device=torch.device(device),
        identity=digest,
    )


class NetworkExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """A pretrained network as a torch-fidelity extractor with the layer ``vector`` (B, d)."""

    def __init__(self, network: PretrainedFeatures) -> None:
        super().__init__("network", ["vector"])
        self.network = network

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return (self.network.pooled(pictures / 255).float(),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("vector",)


def _downloaded_inception() -> Path:
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except Exception as error:
        raise UserError(
            f"Inception-v3's weights cannot be downloaded ({error}); provide the file {INCEPTION_FILE} of "
            "torch-fidelity's release v0.2.0 and give its path with --inception-weights, or measure by a CLIP"
        ) from error
    return path


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"Inception-v3's weights {path} do not exist; provide the file {INCEPTION_FILE} of "
            "torch-fidelity's release v0.2.0 and give its path with --inception-weights"
        )
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read as tensors; provide the file {INCEPTION_FILE}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict; provide the file {INCEPTION_FILE}")
    return state


def cached_features(
    pictures: Pictures,
    digests: Sequence[str],
    features: Features,
    cache: Path,
    *,
    blur: float = 0,
    bar: Progress | None = None,
) -> CachedFeatures:
    """Return the features of all pictures, which the folder ``cache`` holds in chunks; extract chunks that it lacks.

    ``digests`` are the hashes of the pictures' files; ``blur`` is a Gaussian's standard deviation in pixels.

    Raises:
        UserError: a picture is broken, or the cache cannot be written.
    """
    files = []
    for start in range(0, len(pictures), CHUNK):
        rows = range(start, min(start + CHUNK, len(pictures)))
        file = cache / f"{_key(features, pictures, blur, digests[rows.start : rows.stop])}.safetensors"
        if not _is_cached(file, len(rows), features):
            chunk = features.extract(
                BlurredPictures(PictureSubset(pictures, rows), blur), workers=features.device.type == "cuda"
            )
            _write(file, chunk)
        files.append(file)
        if bar is not None:
            bar.advance(len(rows))
    return CachedFeatures(files, len(pictures))


def _key(features: Features, pictures: Pictures, blur: float, digests: Sequence[str]) -> str:
    what = [CACHE_FORMAT, features.identity, pictures.image_size, float(blur), list(digests)]
    if pictures.fit != "crop":
        what.append(pictures.fit)
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _is_cached(file: Path, count: int, features: Features) -> bool:
    """Return whether the cache holds a chunk of ``count`` pictures, undamaged; earlier versions kept no checksum."""
    try:
        with safe_open(file, "pt") as tensors:
            names = {"vectors"} if features.logits is None else {"vectors", "logits"}
            layers = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            known = (tensors.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return False
    return layers.keys() == names and all(len(part) == count for part in layers.values()) and known == _hash_of(layers)


def _read(file: Path, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """Return some rows of the layers of a cached chunk, whose file is mapped into memory and not read whole."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name)[torch.as_tensor(rows)] for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); run the same command again to make it anew") from None


def _write(file: Path, chunk: Extracted) -> None:
    layers = {"vectors": chunk.vectors} | ({} if chunk.logits is None else {"logits": chunk.logits})
    layers = {name: layer.contiguous() for name, layer in layers.items()}
    write_atomically(file, save(layers, {"sha256": _hash_of(layers)}))


def _hash_of(layers: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        digest.update(f"{name} {layer.dtype} {tuple(layer.shape)}".encode() + layer.numpy().tobytes())
    return digest.hexdigest()
