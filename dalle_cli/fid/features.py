"""Features that pictures are measured by, and their cache.

Either Inception-v3's, on which FID, KID and IS are published, or a CLIP's image features. Both are torch-fidelity
feature extractors, so the same code computes the metrics on either.
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

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from dalle_cli.clip.scoring import Scorer
from dalle_cli.errors import UserError
from dalle_cli.fid.figures import ScoreName
from dalle_cli.fid.pictures import BlurredPictures, Pictures, PictureSubset
from dalle_cli.progress import Progress
from dalle_cli.stores.files import sha256_file, write_atomically

INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]
INCEPTION_SHA256 = INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[-1]
"""The published weights carry the first digits of their sha256 in their name."""

CACHE_FORMAT = 1
CHUNK = 1024
"""Pictures whose features are extracted and cached together."""


@dataclass(frozen=True)
class Features:
    """A feature extractor that is ready to run, and the names of what it measures."""

    name: str
    """Name of the features; it stands beside every figure."""
    extractor: FeatureExtractorBase
    vector: str
    """Layer that FID, KID, precision and recall compare."""
    logits: str | None
    """Layer of class logits, which the score by class needs; None if there is none."""
    score_name: ScoreName
    device: torch.device
    identity: str
    """Hash of all that a picture's features depend on, apart from the picture."""
    warnings: list[str] = field(default_factory=list)

    def extract(self, pictures: Dataset[Tensor], *, batch_size: int = 64, workers: bool = False) -> Extracted:
        """Return the features of a dataset of (3, H, W) uint8 pictures of one size.

        ``workers`` decodes pictures ahead in a few processes.

        Raises:
            UserError: a picture is missing or broken.
        """
        try:
            with warnings.catch_warnings():
                # torch-fidelity may start more workers than the machine has cores; it does no harm, they only decode.
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                layers = get_featuresdict_from_dataset(
                    pictures, self.extractor, batch_size, self.device.type == "cuda", not workers, False
                )
        except UserError as error:
            # An error of a worker process holds that process's traceback; the message is its last line.
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from error
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


def inception(weights_path: Path | None = None, *, device: str = "cpu") -> Features:
    """Return Inception-v3 as torch-fidelity ports it from the TensorFlow graph of the published FID.

    Args:
        weights_path: File of the port's weights, as torch-fidelity publishes it. Without it, the file is looked for in
            torch's hub folder and else downloaded.
        device: Device to run on.

    Raises:
        UserError: the file is missing and cannot be downloaded, or does not hold this network's weights.
    """
    path = weights_path if weights_path is not None else _downloaded_inception()
    state = _state_dict(path)
    digest = sha256_file(path)
    published = digest.startswith(INCEPTION_SHA256)
    # torch-fidelity would unpickle the file without restriction, so it gets a copy of the tensors read safely.
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
        else [f"{path.name} is not the published {INCEPTION_FILE}: figures do not compare with published ones"],
    )


def clip_features(
    scorer: Scorer, class_captions: Sequence[str] = (), *, device: torch.device | str = "cpu"
) -> Features:
    """Return the image features of a CLIP; FID and KID on them do not compare with Inception's.

    A feature is the scorer's unit vector times sqrt(d). Its coordinates then have a mean square of 1 whatever the
    width, and KID's kernel (x.y / d + 1)^3 is (cosine + 1)^3.

    Args:
        scorer: The CLIP.
        class_captions: Captions of classes, two or more, or none. With them each picture also gets class logits: its
            scaled similarities to these captions, which is CLIP's classification without training. The inception
            score's formula on them is called ``clip_is``.
        device: Device of the scorer, on which distances are computed.
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
    """A :class:`Scorer` as torch-fidelity's extractor, with layers ``vector`` (B, d) and ``logits`` (B, classes)."""

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


def default_cache() -> Path:
    """Return ``dalle/features`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle" / "features"


def cached_features(
    pictures: Pictures,
    digests: Sequence[str],
    features: Features,
    cache: Path,
    *,
    blur: float = 0,
    bar: Progress | None = None,
) -> Extracted:
    """Return the features of all pictures, read from the folder ``cache`` if they are in it, and else added to it.

    Args:
        pictures: The pictures to measure.
        digests: Hash of each picture's file; the cache's keys are made of these.
        features: Extractor of the features.
        cache: Folder of cached chunks.
        blur: Standard deviation of the Gaussian blur in pixels.
        bar: Progress bar, advanced by one for each picture.

    Raises:
        UserError: a picture is broken, or the cache cannot be written.
    """
    chunks = []
    for start in range(0, len(pictures), CHUNK):
        rows = range(start, min(start + CHUNK, len(pictures)))
        file = cache / f"{_key(features, pictures.image_size, blur, digests[rows.start : rows.stop])}.safetensors"
        chunk = _read(file, len(rows), features)
        if chunk is None:
            chunk = features.extract(
                BlurredPictures(PictureSubset(pictures, rows), blur), workers=features.device.type == "cuda"
            )
            _write(file, chunk)
        chunks.append(chunk)
        if bar is not None:
            bar.advance(len(rows))
    logits = [chunk.logits for chunk in chunks if chunk.logits is not None]
    return Extracted(torch.cat([chunk.vectors for chunk in chunks]), torch.cat(logits) if logits else None)


def _key(features: Features, image_size: int, blur: float, digests: Sequence[str]) -> str:
    what = [CACHE_FORMAT, features.identity, image_size, float(blur), list(digests)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read(file: Path, count: int, features: Features) -> Extracted | None:
    """Return the chunk, or None if it is missing or damaged, in which case it is extracted again."""
    try:
        tensors = load(file.read_bytes())
        found = Extracted(tensors["vectors"], tensors.get("logits"))
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found) == count and (found.logits is None) == (features.logits is None) else None


def _write(file: Path, chunk: Extracted) -> None:
    tensors = {"vectors": chunk.vectors} | ({} if chunk.logits is None else {"logits": chunk.logits})
    write_atomically(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
