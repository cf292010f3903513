"""The typed settings of a recipe.

A recipe is one YAML file that describes a whole chain: data, tokenizer, dVAE, prior, CLIP, sampling. Defaults are
the paper's (Ramesh et al. 2021, arXiv 2102.12092, sections 2 and 3, appendices A to E), so that a recipe says only
what it changes. Every key is documented here and nowhere else. A checkpoint holds its recipe with every key resolved;
``dalle show RECIPE`` prints the main settings and the sizes of the models.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dalle_cli.config.layout import AttentionKind, parse_layout

Positive = Annotated[int, Field(gt=0, lt=2**53)]
MOST_SAMPLES = 1_000_000
"""Largest number of samples of a caption."""
Size = Annotated[int, Field(gt=0, le=2**20)]
"""A width, a side or a length, so bounded that shapes of models do not overflow."""
Depth = Annotated[int, Field(gt=0, le=10_000)]
"""A number of layers, each of which takes memory of its own before any weight does."""
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of every block of settings. It refuses unknown keys; values do not change once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_null_characters(cls, given: Any) -> Any:
        """Refuse a character that no name of a file can have, and that every use of such a name would stumble over."""
        for name, value in given.items() if isinstance(given, dict) else ():
            if any(isinstance(text, str) and "\0" in text for text in (value if isinstance(value, list) else [value])):
                raise ValueError(f"{name} holds a NUL character; leave it out")
        return given


class Filters(Settings):
    """Filters of captions and pictures; null turns a filter off. Stores count what each filter leaves out by its name.

    The paper (section 2.3 and appendix C) drops captions that are too short, not English, or mostly boilerplate, and
    pictures whose aspect ratio lies outside [1/2, 2]. It gives a number for the aspect ratio only, so that filter alone
    is on by default. For the others, ``dalle scan`` shows how many samples of the data at hand a common value would
    drop. The paper filters by language with cld3; ``language`` does so with py3langid, and ``min_ascii_letters``, which
    drops Greek but keeps French, needs no package.
    """

    min_words: Positive | None = Field(None, description="minimum number of words, which white space separates")
    max_words: Positive | None = Field(None, description="maximum number of words")
    min_characters: Positive | None = Field(None, description="minimum number of characters of a caption")
    max_characters: Positive | None = Field(None, description="maximum number of characters of a caption")
    max_word_run: Positive | None = Field(None, description="maximum number of times a word is repeated in a row")
    min_unique_words: Share | None = Field(None, description="minimum share of distinct words among the words")
    max_upper_case: Share | None = Field(None, description="maximum share of capitals among the cased letters")
    max_boilerplate: Share | None = Field(
        None, description="maximum share of the letters and digits in dates, URLs, file names and stock phrases"
    )
    boilerplate: list[str] = Field([], description="further regular expressions that max_boilerplate counts")
    min_ascii_letters: Share | None = Field(None, description="minimum share of a to z among the letters")
    language: Annotated[str, Field(pattern="^[a-z]{2}$")] | None = Field(
        None,
        description="ISO 639 code, such as en: leave out captions that are in another language by py3langid (the extra "
        "languages); one whose language is unsure stays",
    )
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = Field(2.0, description="maximum of longer / shorter side")
    min_side: Positive | None = Field(None, description="minimum number of pixels of the shorter side")
    min_contrast: Annotated[float, Field(ge=0)] | None = Field(
        None, description="minimum standard deviation of the grey levels (0 to 255) at 64 x 64 pixels"
    )

    @model_validator(mode="after")
    def _patterns_compile(self) -> Filters:
        for pattern in self.boilerplate:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"boilerplate {pattern!r} is no regular expression: {error}") from None
        return self


class DataSettings(Settings):
    """The captioned pictures and their augmentation (paper, listings 1 and 2)."""

    train: str | list[str] | None = Field(
        None, description="source of the training pictures: a folder, tars, a manifest, COCO ...; or a list of sources"
    )
    weights: list[Positive] | None = Field(
        None, description="number of times that each epoch takes the samples of each source in train; null: once"
    )
    holdout: Share = Field(0.0, description="share of the samples that is held out of training")
    validation: str | None = Field(
        None, description="source of the held-out pictures, in place of a share of those in train"
    )
    crop: bool = Field(True, description="crop pictures at random in training; false: always at the centre")
    dvae_crop: Literal["anywhere", "centre"] = Field(
        "anywhere",
        description="crops in the dVAE's training: anywhere, of 8/12 to 8/9 of the side (the paper's Listing 1), "
        "or as those of the prior's pictures, near the centre and of 8/9 or more (Listing 2)",
    )
    fit: Literal["crop", "pad", "stretch"] = Field(
        "crop",
        description="how a picture that is not square becomes so: by cropping, as in the paper, by white bars, or by "
        "stretching; the last two lose nothing at the sides, and pictures are cropped after them as crop says",
    )
    views: Positive = Field(
        1,
        description="number of crops of each picture that encode-images encodes for the prior, the first central and "
        "the others random; each epoch of the prior sees the next one",
    )
    flip: bool = Field(True, description="mirror pictures at random when the dVAE is trained, never for the prior")
    max_pixels: Positive = Field(100_000_000, description="skip a picture whose header claims more pixels")
    exclude: str | None = Field(
        None, description="file of keys to leave out: the lines of dalle overlap, or plain keys"
    )
    filters: Filters = Filters()

    @property
    def sources(self) -> list[str]:
        """The sources in ``train``, and after them that of ``validation``."""
        train = [self.train] if isinstance(self.train, str) else self.train or []
        return [*train, *([] if self.validation is None else [self.validation])]

    @property
    def holds_out(self) -> bool:
        """True if any samples are held out."""
        return self.holdout > 0 or self.validation is not None

    @model_validator(mode="after")
    def _sources_agree(self) -> DataSettings:
        if isinstance(self.train, list) and not self.train:
            raise ValueError("train is an empty list; name a source, or leave it out")
        training = len(self.sources) - (self.validation is not None)
        if self.weights is not None and training and len(self.weights) != training:
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {training} sources in train; give one for each"
            )
        if self.validation is not None and self.holdout:
            raise ValueError(f"validation names the held-out pictures, and holdout is {self.holdout:g}; set holdout: 0")
        return self

    @model_validator(mode="after")
    def _views_differ(self) -> DataSettings:
        if self.views > 1 and not self.crop:
            raise ValueError(f"views {self.views} are random crops, and crop is false; set crop: true, or views: 1")
        return self


class TokenizerSettings(Settings):
    """BPE over lower-cased captions (paper, section 2.2)."""

    vocab_size: Annotated[int, Field(ge=256, le=65535)] = Field(16384, description="number of BPE tokens")
    text_length: Size = Field(256, description="number of text positions; shorter captions are padded")
    dropout: Share = Field(
        0.1, description="BPE dropout: probability of skipping a merge, drawn anew each time training sees a caption"
    )
    min_frequency: Positive = Field(2, description="minimum number of occurrences for a pair to be merged")
    overlong: Literal["truncate", "refuse"] = Field("truncate", description="action on captions that are too long")

    @model_validator(mode="before")
    @classmethod
    def _without_stored_versions(cls, given: Any) -> Any:
        """Drop ``dropout_epochs`` of earlier versions, the number of dropped versions in a store; 0 stood for none."""
        if isinstance(given, dict) and "dropout_epochs" in given:
            given = dict(given)
            if given.pop("dropout_epochs") == 0:
                given["dropout"] = 0.0
        return given


class DvaeModel(Settings):
    """Sizes of the dVAE (paper, appendix A.1)."""

    n_hid: Size = Field(256, description="width of the first encoder group; the four groups are x1, x2, x4, x8")
    n_init: Size = Field(128, description="width of the codebook vectors, the decoder's input")
    blocks_per_group: Depth = Field(2, description="number of resblocks in each group")
    downsampling: Literal[4, 8, 16] = Field(8, description="pixels along a side per image token")
    codebook_size: Annotated[int, Field(gt=1, le=65535)] = Field(8192, description="number of image tokens")
    codebook_std: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="standard deviation of the codebook's initial values; null: 1 / sqrt(codebook_size), as in the "
        "paper's code. Vectors of that size lie too close together for a short run, which 0.5 suits; with 1, small "
        "models collapse to one code",
    )
    checkpoint_resblocks: bool = Field(False, description="recompute activations in the backward pass, block by block")


class Ramp(Settings):
    """A value that changes from ``start`` to ``end`` within ``updates`` updates; a plain number is a constant."""

    start: float
    end: float
    updates: Annotated[int, Field(ge=0)]
    shape: Literal["linear", "cosine", "exponential"] = Field("cosine", description="curve of the change")

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_constant(cls, given: Any) -> Any:
        return {"start": given, "end": given, "updates": 0} if isinstance(given, int | float) else given

    @model_validator(mode="after")
    def _exponential_is_positive(self) -> Ramp:
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(f"an exponential ramp needs positive values, not {self.start} and {self.end}")
        return self


class Perceptual(Settings):
    """Distance between the features of pictures and of their reconstructions, which the paper does not use."""

    weight: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the distance; 0: none, as in the paper")
    network: str = Field(
        "tf_efficientnet_lite0",
        description="timm's name of the pretrained network, or a folder in timm's format; the extra 'pretrained' has "
        "the weights of tf_efficientnet_lite0",
    )
    enlarged_from: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="update from which the distance of the pictures at twice their size is added, which brings out "
        "textures and makes updates slower; null: never",
    )


class DvaeObjective(Settings):
    """The relaxed ELBO and its schedules (paper, section 2.1 and appendix A.2)."""

    estimator: Literal["gumbel", "reinforce"] = Field("gumbel", description="gradient estimator of the discrete codes")
    reinforce_samples: Annotated[int, Field(ge=2)] = Field(2, description="number of samples per picture for REINFORCE")
    kl_weight: Ramp = Field(Ramp(start=0.0, end=6.6, updates=5000), description="beta, the weight of the KL term")
    marginal_kl_weight: Ramp = Field(
        Ramp(start=0.0, end=0.0, updates=0),
        description="weight of the KL of a batch's mean posterior, 0 in the paper; above 0 it keeps codes in use while "
        "the decoder is poor; below 0, at the end of a run, it lowers the codes' entropy and so merges synonyms",
    )
    temperature: Ramp = Field(Ramp(start=1.0, end=1 / 16, updates=150_000), description="tau of the Gumbel-softmax")
    ln_b_floor: float = Field(
        -4.0, description="minimum of the likelihood's ln b; without it, flat pictures shrink b and gradients explode"
    )
    logit_laplace_eps: Annotated[float, Field(gt=0, lt=0.5)] = Field(0.1, description="pixels map to [eps, 1 - eps]")
    perceptual: Perceptual = Perceptual()

    @model_validator(mode="after")
    def _perceptual_needs_a_gradient(self) -> DvaeObjective:
        if self.perceptual.weight and self.estimator == "reinforce":
            raise ValueError(
                "perceptual.weight needs the gradient that flows through relaxed codes; set estimator: gumbel, or the "
                "weight to 0"
            )
        return self


class LearningRate(Settings):
    """Linear warm-up to ``peak``; then constant, a cosine down to ``final``, or halved at each plateau of the loss."""

    peak: Annotated[float, Field(gt=0)] = Field(description="learning rate after the warm-up")
    warmup_updates: Annotated[int, Field(ge=0)] = Field(0, description="number of updates of the linear warm-up")
    schedule: Literal["constant", "cosine", "plateau"] = Field("cosine", description="what follows the warm-up")
    final: Annotated[float, Field(ge=0)] = Field(0.0, description="lowest learning rate of cosine and plateau")
    decay_updates: Positive | None = Field(None, description="update at which the cosine ends; null: the last one")
    plateau_watches: Literal["training", "validation"] = Field(
        "training",
        description="loss whose plateaus halve the rate: the mean training loss between two validations, as in the "
        "paper, or the held-out loss",
    )
    plateau_validations: Positive = Field(5, description="number of validations without a gain before a halving")
    plateau_threshold: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="minimum relative fall of the watched loss that counts as a gain"
    )
    plateau_halvings: Positive | None = Field(5, description="maximum number of halvings; null: no limit")


class Adam(Settings):
    """AdamW. Weight decay is decoupled and applies to matrices only, not to embeddings, biases or gains."""

    beta1: Share = Field(0.9, description="decay of the first moment")
    beta2: Share = Field(0.999, description="decay of the second moment")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="term added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-4, description="decoupled weight decay")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(None, description="maximum global norm of the gradient")


class Training(Settings):
    """The training loop of a stage."""

    updates: Annotated[int, Field(gt=0, le=10**12)] = Field(description="number of updates of the whole run")
    batch_size: Positive = Field(description="number of samples per update, over all ranks")
    micro_batch: Positive | None = Field(None, description="number of samples per forward pass; null: all at once")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="decay of the EMA weights per update")
    ema_warmup: bool = Field(
        True,
        description="lower the decay in the first updates, to (1 + t) / (10 + t) after t; the paper does not say so",
    )
    ema_every: Positive = Field(
        1,
        description="number of updates per step of the EMA, whose decay is ema_decay to that power; above 1 the EMA "
        "weights stay in host memory (25 in the paper)",
    )
    log_every: Positive = Field(50, description="number of updates per line of metrics")
    validate_every: Positive = Field(1000, description="number of updates per validation")
    validation_samples: Positive = Field(1024, description="number of held-out samples of a validation")
    save_every: Positive = Field(1000, description="number of updates per checkpoint")
    keep: Positive = Field(2, description="number of newest checkpoints to keep, beside the best one")
    patience: Positive | None = Field(
        None, description="number of validations without a lower loss after which a run stops; null: it never does"
    )
    workers: Annotated[int, Field(ge=0)] = Field(1, description="number of processes that decode pictures ahead")

    @model_validator(mode="after")
    def _counts_agree(self) -> Training:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}; choose a divisor"
            )
        if self.ema_every > self.updates:
            raise ValueError(
                f"ema_every {self.ema_every} is above updates {self.updates}, so that the EMA weights would stay at "
                "their initial values; lower it"
            )
        return self


class DvaeSettings(Settings):
    """Settings of the dVAE and its training."""

    model: DvaeModel = DvaeModel()
    init: str | None = Field(
        None,
        description="checkpoint, or run, whose weights the training begins from; null: they begin at random",
    )
    objective: DvaeObjective = DvaeObjective()
    learning_rate: LearningRate = LearningRate(peak=1e-4, final=1.25e-6)
    adam: Adam = Adam()
    training: Training = Training(updates=3_000_000, batch_size=512, save_every=5000, validate_every=5000)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="type of the convolutions in training; weights, likelihood and KL stay in 32 bit. fp16 scales the "
        "loss, as in the paper, and is for GPUs. auto: on a GPU bf16 if it has it, in one process on a CPU the faster "
        "of fp32 and bf16, as measured, else fp32",
    )

    @model_validator(mode="after")
    def _marginal_needs_the_batch(self) -> DvaeSettings:
        marginal = self.objective.marginal_kl_weight
        if marginal.start < 0:
            raise ValueError(
                f"objective.marginal_kl_weight starts at {marginal.start}, which would leave one code in use; start it "
                "at 0 or above: only its end may be negative"
            )
        if (marginal.start or marginal.end) and self.training.micro_batch is not None:
            raise ValueError(
                "objective.marginal_kl_weight needs the whole batch, but training.micro_batch splits it; "
                "set the first to 0, or the second to null"
            )
        return self


class PriorModel(Settings):
    """Sizes and attention layout of the sparse transformer (paper, section 2.2 and appendix B.1)."""

    layers: Depth = Field(64, description="number of layers, each an attention and an MLP resblock")
    heads: Size = Field(62, description="number of attention heads")
    d_head: Size = Field(64, description="width of a head")
    d_model: Size = Field(3968, description="heads x d_head, which it is if left out")
    grid: Size = Field(
        32, description="number of image tokens along a side: image_size / dvae.model.downsampling, if left out"
    )
    layout: str | list[str] = Field(
        "paper",
        description="attention of each layer: 'paper', or kinds such as 'row, column, row, row, ... conv', where "
        "'...' repeats the kinds before it",
    )
    conv_kernel: Size = Field(11, description="side of the window of convolutional attention")
    checkpoint_resblocks: bool = Field(False, description="recompute activations in the backward pass, block by block")

    @classmethod
    def of_heads(cls, *, layers: int, heads: int, d_head: int, **rest: Any) -> PriorModel:
        """Return the settings of a model with d_model = heads x d_head."""
        return cls(layers=layers, heads=heads, d_head=d_head, d_model=heads * d_head, **rest)

    def attention_kinds(self) -> list[AttentionKind]:
        """Return the kind of attention of each layer, first layer first."""
        return parse_layout(self.layout, self.layers)

    @model_validator(mode="after")
    def _sizes_agree(self) -> PriorModel:
        if self.d_model != self.heads * self.d_head:
            raise ValueError(
                f"d_model {self.d_model} is not heads x d_head = {self.heads} x {self.d_head} = "
                f"{self.heads * self.d_head}; set d_model: {self.heads * self.d_head}"
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel {self.conv_kernel} is even; a centred window needs an odd side")
        self.attention_kinds()
        return self


class PriorObjective(Settings):
    """Weighted cross-entropies of text and image, each a mean over its own tokens (paper, section 2.2)."""

    text_weight: Share = Field(1 / 8, description="weight of the text's cross-entropy; the image's has the rest")


class Sharding(Settings):
    """ZeRO among the ranks of a node (paper, section 2.5)."""

    engine: Literal["fsdp", "deepspeed"] = Field(
        "fsdp", description="library that shards: torch's FSDP, or DeepSpeed, which also offloads with a single GPU"
    )
    zero: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage: 0 none, 1 moments, 2 + gradients, 3 + parameters")
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where weights and moments wait outside the GPU: cpu in host memory, nvme (DeepSpeed) on the disk",
    )
    nvme_path: str | None = Field(None, description="folder on the NVMe disk of each node that offload: nvme uses")
    node_size: Positive | None = Field(None, description="number of ranks that shard a model; null: all of a node")

    @model_validator(mode="after")
    def _engine_can_do_it(self) -> Sharding:
        if self.engine == "deepspeed" and not self.zero:
            raise ValueError("engine deepspeed is for ZeRO, and zero is 0; set zero: 1, 2 or 3, or engine: fsdp")
        if self.offload == "nvme" and (self.engine != "deepspeed" or self.zero < 3 or self.nvme_path is None):
            raise ValueError(
                "offload nvme needs engine: deepspeed, zero: 3 and an nvme_path; set them, or offload: cpu"
            )
        return self


class PowerSgd(Settings):
    """Low-rank compression of gradients between nodes (paper, section 2.5 and appendix E)."""

    rank: Annotated[int, Field(ge=0)] = Field(
        0, description="rank of a matrix's factors, divided among its shards in a node; 0: no compression"
    )
    warm_start: bool = Field(
        True, description="start from the last update's factor; false: from a fixed Gaussian one, as in the paper"
    )
    error_feedback: bool = Field(True, description="add the error of an update's compression to the next gradient")
    start_update: Annotated[int, Field(ge=0)] = Field(0, description="number of first updates without compression")
    min_compression: Annotated[float, Field(ge=0)] = Field(
        1.0, description="compress a matrix if its factors are more than this many times smaller; 1: break-even"
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="cpu: keep error buffers and factors in host memory between updates"
    )


class PriorSettings(Settings):
    """Settings of the prior and its training."""

    model: PriorModel = PriorModel()
    init: str | None = Field(
        None,
        description="checkpoint, or run, whose weights the training begins from; null: as image_embedding says",
    )
    objective: PriorObjective = PriorObjective()
    learning_rate: LearningRate = LearningRate(peak=4.5e-4, warmup_updates=5000, schedule="plateau")
    adam: Adam = Adam(beta1=0.9, beta2=0.96, weight_decay=4.5e-2, clip_norm=4.0)
    training: Training = Training(updates=430_000, batch_size=1024, save_every=2000, validate_every=2000)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="type of the resblocks. auto: on a GPU bf16 if it has it, in one process on a CPU the faster of "
        "fp32 and bf16, as measured, else fp32",
    )
    skip: Literal["update", "resblock"] = Field(
        "update",
        description="with precision fp16, what a resblock's non-finite gradient leaves out: the whole update (the "
        "paper), or that resblock alone",
    )
    image_embedding: Literal["random", "codebook"] = Field(
        "random",
        description="initial embeddings and unembeddings of image tokens: random (the paper), or the dVAE's codebook",
    )
    caption_dropout: Share = Field(
        0.0, description="share of training captions replaced by the empty one, for classifier-free guidance"
    )
    token_noise: Share = Field(
        0.0,
        description="share of the image tokens that training sees replaced by random ones, while it predicts the true "
        "ones; it keeps a prior from memorising thousands of pictures; 0: none, as in the paper",
    )
    drawings: Annotated[int, Field(ge=0)] = Field(
        0,
        description="number of held-out captions that are drawn at each validation, for TensorBoard and the report; "
        "not for a sharded prior",
    )
    sharding: Sharding = Sharding()
    powersgd: PowerSgd = PowerSgd()

    @model_validator(mode="after")
    def _rank_fits(self) -> PriorSettings:
        # The shards of a matrix share the rank, so that it may be above the matrix's own; how many there are is known
        # only if the recipe says it.
        shards = (self.sharding.node_size or 1) if self.sharding.zero else 1
        if self.powersgd.rank > shards * self.model.d_model:
            times = "" if shards == 1 else f" times {shards} shards"
            raise ValueError(
                f"powersgd.rank {self.powersgd.rank} is above the matrices' smaller side, d_model "
                f"{self.model.d_model}{times}; choose a lower rank, or 0 for no compression"
            )
        return self

    @model_validator(mode="after")
    def _engine_knows_the_precision(self) -> PriorSettings:
        if self.sharding.engine == "deepspeed" and self.precision == "fp16":
            raise ValueError(
                "precision fp16, with a gradient scale for each resblock, is for sharding.engine fsdp; set the engine "
                "to fsdp, or the precision to bf16"
            )
        return self


class ClipModel(Settings):
    """Sizes of a small CLIP, a vision and a text transformer built from open_clip's classes."""

    embed_dim: Size = Field(256, description="width of the features that are compared")
    vision: str | None = Field(
        None,
        description="pretrained network in place of the vision transformer, of which only a projection is trained: "
        "timm's name, or a folder in timm's format; the extra 'pretrained' brings tf_efficientnet_lite0",
    )
    vision_size: Size = Field(128, description="side to which pictures are resized for the pretrained network")
    patch_size: Size = Field(16, description="side, in pixels, of the vision transformer's patches")
    vision_width: Size = Field(256, description="width of the vision transformer")
    vision_layers: Depth = Field(6, description="number of its layers")
    text_width: Size = Field(256, description="width of the text transformer")
    text_layers: Depth = Field(4, description="number of its layers")
    head_width: Size = Field(64, description="width of an attention head in both transformers")

    @model_validator(mode="after")
    def _heads_divide(self) -> ClipModel:
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % self.head_width:
                raise ValueError(f"{name} {getattr(self, name)} is no multiple of head_width {self.head_width}")
        if self.vision_width % 4:
            raise ValueError(f"vision_width {self.vision_width} is no multiple of 4, as sine-cosine positions need")
        return self


class ClipObjective(Settings):
    """Negatives that teach a small CLIP relations between things, not only which things a picture shows."""

    hard_negatives: Positive = Field(
        1,
        description="size of the groups of pictures with similar image tokens that batches consist of; finding them "
        "takes a second of CPU per 8,192 pictures; 1: random batches",
    )
    caption_negatives: bool = Field(
        False, description="contrast a caption with the other captions of its batch too, not only with its pictures"
    )


class ClipSettings(Settings):
    """Settings of the CLIP that reranks, and its training."""

    model: ClipModel = ClipModel()
    init: str | None = Field(
        None,
        description="checkpoint, or run, whose weights the training begins from; null: they begin at random",
    )
    objective: ClipObjective = ClipObjective()
    learning_rate: LearningRate = LearningRate(peak=5e-4, warmup_updates=500)
    adam: Adam = Adam(beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.2, clip_norm=1.0)
    training: Training = Training(updates=20_000, batch_size=256)

    @model_validator(mode="after")
    def _groups_fill_the_batch(self) -> ClipSettings:
        if self.training.batch_size % self.objective.hard_negatives:
            raise ValueError(
                f"objective.hard_negatives {self.objective.hard_negatives} does not divide training.batch_size "
                f"{self.training.batch_size}; choose a divisor"
            )
        return self


class SamplingSettings(Settings):
    """Sampling from the prior (paper, section 2.6)."""

    n: Annotated[int, Field(gt=0, le=MOST_SAMPLES)] = Field(512, description="number of samples per caption")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="temperature; 0 takes the likeliest token")
    top_k: Positive | None = Field(None, description="sample among the k likeliest tokens; null: among all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="total probability of the tokens sampled from")
    guidance: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="classifier-free guidance S: logits = uncond + S (cond - uncond); 1 is the plain prior, other "
        "values need one trained with prior.caption_dropout, and twice the time",
    )
    batch_size: Positive | None = Field(
        None, description="maximum number of samples drawn at once; null: as many as fit in memory and speed it up"
    )
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "fp32",
        description="type of the resblocks, keys and values; each draws other samples. int8: the matrices of the "
        "resblocks and of the logits in 8 bits and all else in 32, for one or a few samples at once on a CPU. auto: on "
        "a CPU the faster of fp32 and bf16, as measured once, on a GPU bf16 if it has it; a folder of samples keeps "
        "it, and shares (--shard), whose machines may differ, take fp32. prior.drawings take fp32 unless this is bf16",
    )


class Monitoring(Settings):
    """Monitoring of training, beside metrics.jsonl and TensorBoard."""

    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="peak of one device in the precision of training, of which the journal's mfu is the share that the "
        "model uses; null: measured once",
    )
    wandb: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Weights & Biases project to log to; null: none"
    )


def _whole_number_or_idle(value: Any) -> Any:
    if value is None or value == "idle" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"threads must be a whole number above 0, or idle, not {value!r}")


def _off(value: Any) -> Any:
    """Return "off" for false, which is what YAML makes of an unquoted off."""
    return "off" if value is False else value


Compile = Literal["auto", "off"]
Device = Literal["auto", "cuda", "mps", "cpu"]


class Recipe(Settings):
    """A whole chain, from captioned pictures to samples."""

    name: str = Field("dalle", description="name of the recipe, for reports")
    description: str = Field("", description="a line about it, for reports")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of everything random in every stage")
    run: str = Field("runs/dalle", description="folder that stages read from and write to by default")
    threads: Annotated[Positive | Literal["idle"] | None, BeforeValidator(_whole_number_or_idle)] = Field(
        None,
        description="number of CPU threads of a stage; null: all cores. idle: one for each core that other programs "
        "leave idle while a stage trains in one process, so that a run beside other work does not repeat byte for byte",
    )
    device: Device = Field(
        "auto",
        description="device of training and encoding. auto: a GPU by CUDA, else Apple's GPU (mps), else the CPU. "
        "The environment variable DALLE_DEVICE names it for commands without a recipe, and where this is auto",
    )
    compile: Annotated[Compile, BeforeValidator(_off)] = Field(
        "auto",
        description="auto: on a GPU, training goes through torch.compile wherever a trial at its start comes to the "
        "same values; off: never. CPUs never compile",
    )
    tf32: bool = Field(
        True, description="let a GPU round the operands of 32-bit products to TF32, which is up to eight times as fast"
    )
    image_size: Size = Field(256, description="side, in pixels, of the pictures that the dVAE sees")
    data: DataSettings = DataSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    dvae: DvaeSettings = DvaeSettings()
    prior: PriorSettings = PriorSettings()
    clip: ClipSettings = ClipSettings()
    sampling: SamplingSettings = SamplingSettings()
    monitoring: Monitoring = Monitoring()

    @property
    def grid(self) -> int:
        """Number of image tokens along a side."""
        return self.image_size // self.dvae.model.downsampling

    @model_validator(mode="after")
    def _plateaus_are_seen(self) -> Recipe:
        for kind in ("dvae", "prior", "clip"):
            rate = getattr(self, kind).learning_rate
            if rate.schedule == "plateau" and rate.plateau_watches == "validation" and not self.data.holds_out:
                raise ValueError(
                    f"{kind}.learning_rate.plateau_watches is validation, and data.holdout is 0; hold out a share, or "
                    "watch training"
                )
        return self

    @model_validator(mode="after")
    def _stages_agree(self) -> Recipe:
        side = self.dvae.model.downsampling
        if self.image_size % side:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of dvae.model.downsampling, {side}; set it to "
                f"{-(-self.image_size // side) * side}"
            )
        if self.prior.model.grid != self.grid:
            raise ValueError(
                f"prior.model.grid {self.prior.model.grid} is not image_size / dvae.model.downsampling = {self.grid}; "
                f"set prior.model.grid: {self.grid}"
            )
        if self.clip.model.vision is None and self.image_size % self.clip.model.patch_size:
            raise ValueError(
                f"clip.model.patch_size {self.clip.model.patch_size} does not divide image_size {self.image_size}; "
                "choose a divisor"
            )
        return self
