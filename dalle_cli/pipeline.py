"""A trained run from Python: draw captions and rank the pictures, as ``dalle sample`` and ``dalle rerank`` do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from PIL import Image

from dalle_cli.clip.rerank import rerank
from dalle_cli.clip.scorer import Scorer
from dalle_cli.clip.scoring import load_scorer
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.data.images import read_picture
from dalle_cli.data.sample_lines import SampleLine
from dalle_cli.distributed.device import choose_device
from dalle_cli.sampling.request import SampleRequest, default_folder
from dalle_cli.sampling.sampler import Sampler
from dalle_cli.stores.checkpoint import Which, open_stage
from dalle_cli.text.bpe import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A drawn picture; its PNG file stays in the run's folder of samples."""

    caption: str
    index: int
    """Number of the sample among those of its caption."""
    log_likelihood: float
    """ln p(image tokens | caption), in nats."""
    path: Path
    score: float | None = None
    """Cosine of picture and caption in CLIP's space; None before ranking."""

    @cached_property
    def picture(self) -> Image.Image:
        """The picture, RGB.

        Raises:
            UserError: the file is gone or damaged.
        """
        return Image.fromarray(read_picture(self.path, "draw it again"))


class Samples(Sequence[Sample]):
    """Samples of one or several captions, in the order in which they were drawn or ranked."""

    def __init__(self, lines: list[SampleLine], scorer: Scorer | None, pipeline: Pipeline) -> None:
        self._lines, self._scorer, self._pipeline = lines, scorer, pipeline
        self._samples = [
            Sample(line["prompt"], line["index"], line["log_likelihood"], Path(line["png"]), line.get("score"))
            for line in lines
        ]

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self._samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def ranked(self) -> Samples:
        """Return the samples with their scores by the run's CLIP, each caption's best first.

        Raises:
            UserError: the run has no CLIP, or it was trained with another tokenizer.
        """
        scorer = self._scorer or self._pipeline.scorer
        return Samples([line for pool in rerank(self._lines, scorer) for line in pool], scorer, self._pipeline)

    def best(self) -> Image.Image:
        """Return the picture that the run's CLIP ranks first; of several captions, that of the first caption."""
        return self.ranked()[0].picture


class Pipeline:
    """The prior, the dVAE, the tokenizer and the CLIP of a run.

    Example:
        >>> from dalle_cli import Pipeline
        >>> Pipeline.open("runs/quickstart").sample("a large red star", n=8).best().show()
    """

    def __init__(self, places: RunFolders, which: Which = "best") -> None:
        self.places, self.which = places, which
        self._prior = open_stage(places.prior, "prior", which)
        self._sampler = Sampler(self._prior, open_stage(places.dvae, "dvae", which), Tokenizer.load(places.tokenizer))

    @classmethod
    def open(cls, run: str | Path, checkpoint: Which = "best") -> Pipeline:
        """Open the run in a folder, with the best or the last checkpoint of each stage.

        Raises:
            UserError: a stage is missing, or stages do not belong together.
        """
        return cls(RunFolders(Path(run)), checkpoint)

    @cached_property
    def scorer(self) -> Scorer:
        """The run's CLIP."""
        return load_scorer(None, None, None, self.places.prior, choose_device(), self.which)

    def sample(self, captions: str | Sequence[str], n: int | None = None, seed: int = 0, **settings: Any) -> Samples:
        """Draw ``n`` samples of each caption; the same call draws the same pictures, or reads them if they are there.

        Args:
            captions: one caption, or several.
            n: samples of each caption; None: the recipe's ``sampling.n``.
            seed: seed of all samples.
            settings: other settings of the block ``sampling``, such as ``temperature`` and ``guidance``.

        Raises:
            UserError: a caption is empty or a setting is of no use with this prior.
            pydantic.ValidationError: there is no such setting, or its value is out of range.
        """
        recipe = self._prior.recipe().sampling
        given = {**recipe.model_dump(), **settings, **({} if n is None else {"n": n})}
        request = SampleRequest(
            [captions] if isinstance(captions, str) else list(captions), type(recipe).model_validate(given), seed
        )
        folder = default_folder(self.places.samples, request.identity(self._prior))
        return Samples(list(self._sampler.run(request, folder)), None, self)
