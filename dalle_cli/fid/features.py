"""What pictures are measured by: Inception-v3 (the published FID, KID and IS) or a CLIP's image features.

Both are torch-fidelity feature extractors, so one code computes the metrics on either.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from dalle_cli.clip.scoring import Scorer
from dalle_cli.errors import UserError
from dalle_cli.fid.pictures import Blurred, Pictures, SomePictures, Survey
from dalle_cli.progress import Progress
from dalle_cli.stores.files import sha256_file, write_atomically

INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]
INCEPTION_SHA256 = INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[-1]
"""The published weights carry the first digits of their sha256 in their name."""

CLIP_EXTRACTOR = "clip-image"


@dataclass(frozen=True)
class Features:
    """A feature extractor, ready to run, and what its figures are to be called.

    ``name`` says in every output which features were used; ``vector`` is the layer that FID and KID compare,
    ``logits`` the layer of class logits that the inception score needs, if there is one, and ``score_key``
    what that score is called.
    """

    name: str
    extractor: FeatureExtractorBase
    vector: str
    logits: str | None
    score_key: str
    device: torch.device
    identity: str
    """Hash of all that a picture's features depend on besides the picture."""
    warnings: list[str] = field(default_factory=list)

    def extract(self, pictures: Dataset[Tensor], *, batch_size: int = 64, workers: bool = False) -> Extracted:
        """Features of all pictures of a dataset of (3, H, W) uint8 tensors of one size.

        ``workers`` reads ahead in a few processes, for pictures that have to be decoded.
        """
        try:
            with warnings.catch_warnings():
                # torch-fidelity takes more workers than a small machine has cores; they only decode.
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                layers = get_featuresdict_from_dataset(
                    pictures, self.extractor, batch_size, self.device.type == "cuda", not workers, False
                )
        except UserError as error:
            # From a worker process the message comes at the end of that process's traceback.
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from error
        return Extracted(layers[self.vector], None if self.logits is None else layers[self.logits])


@dataclass(frozen=True)
class Extracted:
    """``vectors`` (n, d) float32 and class ``logits`` (n, classes) of n pictures, on the CPU."""

    vectors: Tensor
    logits: Tensor | None

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, rows: Tensor | Sequence[int]) -> Extracted:
        """Those of some pictures, e.g. of the best of each pool."""
        index = torch.as_tensor(rows)
        return Extracted(self.vectors[index], None if self.logits is None else self.logits[index])


def inception(weights_path: Path | None = None, *, device: str = "cpu") -> Features:
    """Inception-v3 as torch-fidelity ports it from the TensorFlow graph of the published FID.

    ``weights_path`` is torch-fidelity's file of that port; without it, the file is looked for in torch's hub
    folder and else fetched. Raises UserError where it is neither there nor to be had, or is not that
    network's weights.
    """
    path = weights_path if weights_path is not None else _fetched_inception()
    state = _state_dict(path)
    digest = sha256_file(path)
    published = digest.startswith(INCEPTION_SHA256)
    # torch-fidelity unpickles whatever its path names; it is handed tensors that were read as tensors only.
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
        score_key="inception_score",
        device=torch.device(device),
        identity=digest,
        warnings=[]
        if published
        else [f"{path.name} is not the published {INCEPTION_FILE}: figures compare with no published ones"],
    )


def clip_features(
    scorer: Scorer, class_captions: Sequence[str] = (), *, device: torch.device | str = "cpu"
) -> Features:
    """Image features of a CLIP. FID and KID on them are no figures to be set beside Inception's.

    A feature is the unit vector of ``scorer`` times sqrt(d), so that coordinates have a mean square of 1
    whatever the width, and KID's kernel (x.y / d + 1)^3 is (cosine + 1)^3. With ``class_captions`` (two or
    more) each picture also gets class logits, the scaled similarities to these captions, as CLIP classifies
    without training; the inception score's formula on them is called ``clip_is``. ``device`` is the scorer's.
    """
    if len(class_captions) == 1:
        raise ValueError("one class has no distribution: give two or more class captions, or none")
    layers = ["vector", "logits"] if class_captions else ["vector"]
    extractor = create_feature_extractor(
        CLIP_EXTRACTOR,
        layers,
        cuda=False,
        scorer=scorer,
        class_captions=list(class_captions),
        verbose=False,
    )
    return Features(
        name=f"clip-image {scorer.name}",
        extractor=extractor,
        vector="vector",
        logits="logits" if class_captions else None,
        score_key="clip_is",
        device=torch.device(device),
        identity=hashlib.sha256(json.dumps([scorer.identity, *class_captions]).encode()).hexdigest(),
    )


class ClipExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """torch-fidelity's face of a :class:`Scorer`; layers ``vector`` (B, d) and ``logits`` (B, classes)."""

    def __init__(
        self,
        name: str,
        features_list: Sequence[str],
        *,
        scorer: Scorer,
        class_captions: Sequence[str] = (),
        **_: Any,
    ) -> None:
        super().__init__(name, list(features_list))
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

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "vector", "kid": "vector", "prc": "vector"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False


if CLIP_EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(CLIP_EXTRACTOR, ClipExtractor)


def _fetched_inception() -> Path:
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except Exception as error:
        raise UserError(
            f"Inception-v3's weights cannot be fetched ({error}); provide the file {INCEPTION_FILE} of "
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


FORMAT = 1
CHUNK = 1024
"""Pictures measured and kept together."""


def default_cache() -> Path:
    """``dalle/features`` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle" / "features"


def cached_features(
    pictures: Pictures,
    found: Survey,
    features: Features,
    cache: Path,
    *,
    blur: float = 0,
    bar: Progress | None = None,
) -> Extracted:
    """Features of all pictures under a Gaussian ``blur``, from the folder ``cache`` where they are in it.

    Raises:
        UserError: a picture is broken, or the cache may not be written.
    """
    chunks = []
    for start in range(0, len(pictures), CHUNK):
        rows = range(start, min(start + CHUNK, len(pictures)))
        file = cache / f"{_key(features, pictures.image_size, blur, found.digests[rows.start : rows.stop])}.safetensors"
        chunk = _read(file, len(rows), features)
        if chunk is None:
            chunk = features.extract(
                Blurred(SomePictures(pictures, rows), blur), workers=features.device.type == "cuda"
            )
            _write(file, chunk)
        chunks.append(chunk)
        if bar is not None:
            bar.advance(len(rows))
    logits = [chunk.logits for chunk in chunks if chunk.logits is not None]
    return Extracted(torch.cat([chunk.vectors for chunk in chunks]), torch.cat(logits) if logits else None)


def _key(features: Features, image_size: int, blur: float, digests: list[str]) -> str:
    what = [FORMAT, features.identity, image_size, float(blur), digests]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read(file: Path, count: int, features: Features) -> Extracted | None:
    """None where there is no such file, or it is damaged: features can be had again."""
    try:
        tensors = load(file.read_bytes())
        found = Extracted(tensors["vectors"], tensors.get("logits"))
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found) == count and (found.logits is None) == (features.logits is None) else None


def _write(file: Path, chunk: Extracted) -> None:
    tensors = {"vectors": chunk.vectors} | ({} if chunk.logits is None else {"logits": chunk.logits})
    write_atomically(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
