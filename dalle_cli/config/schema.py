"""The typed settings of a recipe.

A recipe is one YAML file that describes a whole chain: data, tokenizer, dVAE, prior, CLIP, sampling. Defaults are
the paper's (Ramesh et al. 2021, arXiv 2102.12092, sections 2 and 3, appendices A to E), so that a recipe says only
what it changes. Every key is documented here and nowhere else. A checkpoint holds its recipe with every key resolved;
``dalle show RECIPE`` prints the main settings and the sizes of the models.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dalle_cli.config.layout import AttentionKind, parse_layout

DOWNSAMPLING = 8
"""Pixels of a picture's side per token of the grid's side: three max-poolings by 2 in the dVAE's encoder."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of every block: unknown keys are refused, values do not change once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Filters(Settings):
    """Samples that are left out, each counted under its filter's name; null turns a filter off.

    The paper (appendix C) drops captions that are too short, not English or mostly boilerplate, and pictures whose
    aspect ratio is outside [1/2, 2]. That ratio is the one figure it gives, so it alone is on by default; for the
    others ``dalle scan`` says what a customary value would drop from the data at hand.
    """

    min_words: Positive | None = Field(None, description="least words of a caption, as white space parts them")
    max_words: Positive | None = Field(None, description="most words of a caption")
    min_characters: Positive | None = Field(None, description="least characters of a caption")
    max_characters: Positive | None = Field(None, description="most characters of a caption")
    max_word_run: Positive | None = Field(None, description="most times that one word stands in a row")
    min_unique_words: Share | None = Field(None, description="least share of different words among a caption's words")
    max_upper_case: Share | None = Field(None, description="largest share of capitals among a caption's cased letters")
    max_boilerplate: Share | None = Field(
        None, description="largest share of a caption's letters and digits in dates, URLs, file names, stock phrases"
    )
    boilerplate: list[str] = Field([], description="regular expressions that max_boilerplate counts besides")
    min_ascii_letters: Share | None = Field(
        None, description="least share of a to z among a caption's letters: tells scripts apart, not languages"
    )
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = Field(2.0, description="largest longer side / shorter")
    min_side: Positive | None = Field(None, description="least pixels of a picture's shorter side")
    min_contrast: Annotated[float, Field(ge=0)] | None = Field(
        None, description="least standard deviation of a picture's grey levels (of 255) at 64 x 64"
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
    """Where the captioned pictures come from and how they are cut to size (paper, appendix A.2)."""

    train: str | None = Field(None, description="source of the training pictures: a folder, tars, a manifest, COCO ...")
    holdout: Share = Field(0.0, description="share of the samples left out of training, chosen by a hash of the key")
    crop: bool = Field(True, description="random crops in training; off: centre crop only")
    flip: bool = Field(True, description="random horizontal flips, for the dVAE only (text in pictures)")
    max_pixels: Positive = Field(100_000_000, description="a picture that claims more pixels is refused unread")
    exclude: str | None = Field(None, description="file of keys left out: lines of dalle overlap, or a key a line")
    filters: Filters = Filters()


class TokenizerSettings(Settings):
    """BPE over lower-cased captions (paper, section 2.2)."""

    vocab_size: Annotated[int, Field(ge=256, le=65535)] = Field(16384, description="BPE tokens")
    text_length: Positive = Field(256, description="text positions of the stream; a shorter caption is padded")
    dropout: Share = Field(0.1, description="BPE dropout in training: chance of skipping a merge")
    dropout_epochs: Annotated[int, Field(ge=0)] = Field(
        1, description="BPE-dropped versions of each picture's captions in the store, at least one a caption; 0: none"
    )
    min_frequency: Positive = Field(2, description="a pair seen less often is not merged")
    overlong: Literal["truncate", "refuse"] = Field("truncate", description="captions of more than text_length tokens")


class DvaeModel(Settings):
    """The dVAE's sizes (paper, appendix A.1)."""

    n_hid: Positive = Field(256, description="width of the first encoder group; the groups are x1, x2, x4, x8")
    n_init: Positive = Field(128, description="width of the codebook's vectors, the decoder's input")
    blocks_per_group: Positive = Field(2, description="resblocks in each of the 4 groups")
    codebook_size: Annotated[int, Field(gt=1, le=65535)] = Field(8192, description="image tokens")
    checkpoint_resblocks: bool = Field(False, description="recompute activations in the backward pass, block by block")


class Ramp(Settings):
    """A value that moves from ``start`` to ``end`` over ``updates`` updates and then stays."""

    start: float
    end: float
    updates: Annotated[int, Field(ge=0)]
    shape: Literal["linear", "cosine", "exponential"] = "cosine"

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_constant(cls, given: Any) -> Any:
        return {"start": given, "end": given, "updates": 0} if isinstance(given, int | float) else given

    @model_validator(mode="after")
    def _exponential_is_positive(self) -> Ramp:
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(f"an exponential ramp goes between positive values, not {self.start} and {self.end}")
        return self


class DvaeObjective(Settings):
    """The relaxed ELBO and its schedules (paper, section 2.1 and appendix A.2)."""

    estimator: Literal["gumbel", "reinforce"] = Field("gumbel", description="how gradients pass the discrete codes")
    reinforce_samples: Annotated[int, Field(ge=2)] = Field(2, description="samples a picture, for leave-one-out")
    kl_weight: Ramp = Field(Ramp(start=0.0, end=6.6, updates=5000), description="beta of the ELBO")
    marginal_kl_weight: Ramp = Field(
        Ramp(start=0.0, end=0.0, updates=0),
        description="extra weight of the KL of a batch's mean posterior: above 0 it keeps codes in use while the "
        "decoder is poor; below 0, for the end of a run, it is a price on the codes' entropy, so that what one code "
        "can say is not said by many; 0 in the paper",
    )
    temperature: Ramp = Field(Ramp(start=1.0, end=1 / 16, updates=150_000), description="tau of the Gumbel-softmax")
    ln_b_floor: float = Field(
        -4.0, description="least ln b of the likelihood: on flat pictures b would shrink and gradients grow without end"
    )
    logit_laplace_eps: Annotated[float, Field(gt=0, lt=0.5)] = Field(0.1, description="pixels live in (eps, 1 - eps)")


class LearningRate(Settings):
    """Linear warm-up to ``peak``, then a cosine to ``final`` that ends at ``decay_updates``, or halvings on plateau."""

    peak: Annotated[float, Field(gt=0)]
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    final: Annotated[float, Field(ge=0)] = 0.0
    decay_updates: Positive | None = Field(None, description="where the cosine ends; the last update by default")
    plateau_validations: Positive = Field(5, description="validations without improvement before a halving")
    plateau_threshold: Annotated[float, Field(ge=0)] = Field(1e-3, description="relative gain that counts as one")


class Adam(Settings):
    """AdamW; decay is decoupled and touches matrices only, not embeddings, biases or gains."""

    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(None, description="global gradient norm is clipped here")


class Training(Settings):
    """The loop: how long, how often, how much at once."""

    updates: Positive
    batch_size: Positive = Field(description="samples an update, over all processes")
    micro_batch: Positive | None = Field(None, description="samples a forward pass; the rest is accumulated")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="of the weights' moving average, an update; early in training it is less"
    )
    ema_every: Positive = Field(
        1,
        description="updates from one step of the average to the next, by ema_decay to that power: above 1 it waits in "
        "the host's memory, and up to so many updates behind (25 in the paper)",
    )
    log_every: Positive = 50
    validate_every: Positive = 1000
    validation_samples: Positive = Field(1024, description="held-out samples scored at each validation")
    save_every: Positive = 1000
    keep: Positive = Field(2, description="newest checkpoints kept")
    workers: Annotated[int, Field(ge=0)] = Field(1, description="processes that read and decode ahead")

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Training:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}; choose a divisor"
            )
        return self

    @model_validator(mode="after")
    def _average_moves(self) -> Training:
        if self.ema_every > self.updates:
            raise ValueError(
                f"ema_every {self.ema_every} is above updates {self.updates}, so that the average would stay what "
                "weights began as; lower it"
            )
        return self


class DvaeSettings(Settings):
    model: DvaeModel = DvaeModel()
    objective: DvaeObjective = DvaeObjective()
    learning_rate: LearningRate = LearningRate(peak=1e-4, final=1.25e-6)
    adam: Adam = Adam()
    training: Training = Training(updates=3_000_000, batch_size=512, save_every=5000, validate_every=5000)
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the convolutions in training; weights, likelihood, KL and sampling stay in 32 bit"
    )

    @model_validator(mode="after")
    def _marginal_needs_the_batch(self) -> DvaeSettings:
        marginal = self.objective.marginal_kl_weight
        if marginal.start < 0:
            raise ValueError(
                f"objective.marginal_kl_weight starts at {marginal.start}, which would leave one code in use; start it "
                "at 0 or above, only its end may be negative"
            )
        if (marginal.start or marginal.end) and self.training.micro_batch is not None:
            raise ValueError(
                "objective.marginal_kl_weight looks at the whole batch, training.micro_batch cuts it in parts; "
                "set one of them to 0 or null"
            )
        return self


class PriorModel(Settings):
    """The sparse transformer's sizes and layout (paper, section 2.2 and appendix B.1)."""

    layers: Positive = 64
    heads: Positive = 62
    d_head: Positive = 64
    d_model: Positive = Field(3968, description="heads x d_head")
    grid: Positive = Field(32, description="image tokens a side: image_size / 8")
    layout: str | list[str] = Field(
        "paper",
        description="attention of each layer: 'paper', or kinds such as 'row, column, row, row, ... conv' where "
        "'...' repeats what stands before it",
    )
    conv_kernel: Annotated[int, Field(ge=1)] = Field(11, description="side of the convolutional attention's window")
    checkpoint_resblocks: bool = Field(False, description="recompute activations in the backward pass, block by block")

    @classmethod
    def of_heads(cls, *, layers: int, heads: int, d_head: int, **rest: Any) -> PriorModel:
        """One whose ``d_model`` is what its heads make."""
        return cls(layers=layers, heads=heads, d_head=d_head, d_model=heads * d_head, **rest)

    def attention_kinds(self) -> list[AttentionKind]:
        """The kind of attention of each layer, first layer first. Raises ValueError for a malformed layout."""
        return parse_layout(self.layout, self.layers)

    @model_validator(mode="after")
    def _sizes_agree(self) -> PriorModel:
        if self.d_model != self.heads * self.d_head:
            raise ValueError(
                f"d_model {self.d_model} is not heads x d_head = {self.heads} x {self.d_head} = "
                f"{self.heads * self.d_head}; set d_model: {self.heads * self.d_head}"
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel {self.conv_kernel} is even; a centred window is odd")
        self.attention_kinds()
        return self


class PriorObjective(Settings):
    """Cross-entropies of text and image, each a mean over its own tokens (paper, section 2.2)."""

    text_weight: Share = Field(1 / 8, description="weight of the text's cross-entropy; the image has the rest")


class Sharding(Settings):
    """ZeRO inside a machine (paper, section 2.4), where several processes train together."""

    zero: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage: 0 none, 1 moments, 2 + gradients, 3 + parameters")
    offload: Literal["none", "cpu"] = Field("none", description="where sharded weights and moments wait")
    node_size: Positive | None = Field(
        None, description="processes that shard a model among them; those of a machine by default"
    )


class PowerSgd(Settings):
    """Low-rank compression of gradients between machines (paper, section 2.4 and appendix E)."""

    rank: Annotated[int, Field(ge=0)] = Field(
        0, description="rank of a matrix's factors, shared among a machine's shards of it; 0: gradients are sent whole"
    )
    warm_start: bool = Field(
        True, description="begin from the last update's factor; off: from one drawn at the start, as in the paper"
    )
    error_feedback: bool = Field(True, description="add what an update did not send to the next one's gradients")
    start_update: Annotated[int, Field(ge=0)] = Field(0, description="updates before it send gradients whole")
    min_compression: Annotated[float, Field(ge=0)] = Field(
        1.0, description="a matrix is compressed if its factors are more than so many times smaller; 1: break-even"
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="where what was not sent, and factors, wait for the next update: on the GPU, or its host"
    )


class PriorSettings(Settings):
    model: PriorModel = PriorModel()
    objective: PriorObjective = PriorObjective()
    learning_rate: LearningRate = LearningRate(peak=4.5e-4, warmup_updates=5000, schedule="plateau")
    adam: Adam = Adam(beta1=0.9, beta2=0.96, weight_decay=4.5e-2, clip_norm=4.0)
    training: Training = Training(updates=430_000, batch_size=1024, save_every=2000, validate_every=2000)
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="parameters and activations of resblocks")
    caption_dropout: Share = Field(
        0.0, description="share of the training captions replaced by the empty one, for classifier-free guidance"
    )
    sharding: Sharding = Sharding()
    powersgd: PowerSgd = PowerSgd()

    @model_validator(mode="after")
    def _rank_fits(self) -> PriorSettings:
        if self.powersgd.rank > self.model.d_model:
            raise ValueError(
                f"powersgd.rank {self.powersgd.rank} is above the matrices' smaller side, d_model "
                f"{self.model.d_model}; choose a lower rank, or 0 to send gradients whole"
            )
        return self


class ClipModel(Settings):
    """A small CLIP of open_clip's classes (a vision transformer and a text transformer)."""

    embed_dim: Positive = 256
    patch_size: Positive = 16
    vision_width: Positive = 256
    vision_layers: Positive = 6
    text_width: Positive = 256
    text_layers: Positive = 4
    head_width: Positive = 64

    @model_validator(mode="after")
    def _heads_divide(self) -> ClipModel:
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % self.head_width:
                raise ValueError(f"{name} {getattr(self, name)} is no multiple of head_width {self.head_width}")
        if self.vision_width % 4:
            raise ValueError(f"vision_width {self.vision_width} is no multiple of 4, which positions need")
        return self


class ClipObjective(Settings):
    """Negatives that teach a small CLIP relations between things, not only which things a picture shows."""

    hard_negatives: Positive = Field(
        1,
        description="size of the groups of pictures with similar image tokens that a batch consists of, so that CLIP "
        "has to learn what tells them apart; finding them takes a second of CPU per 8,192 pictures; 1: random batches",
    )
    caption_negatives: bool = Field(
        False, description="contrast a caption with the other captions of its batch too, not only with its pictures"
    )


class ClipSettings(Settings):
    model: ClipModel = ClipModel()
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
    """How tokens are drawn from the prior (paper, section 2.6)."""

    n: Positive = Field(512, description="samples a caption")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="0 takes the likeliest token")
    top_k: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    guidance: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="classifier-free guidance S, logits = uncond + S (cond - uncond): 1 is the prior as it is, other "
        "values take a prior trained with prior.caption_dropout, and twice the time",
    )
    batch_size: Positive | None = Field(
        None, description="most samples drawn at once; null: as many as memory holds and are of use"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the resblocks' matrices, keys and values; bf16 is faster and draws other samples"
    )


class Monitoring(Settings):
    """What training shows of itself, beside metrics.jsonl and TensorBoard."""

    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="peak of one device in the precision trained in, which MFU is the share of; null: measured once by "
        "a square matrix product",
    )
    wandb: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="project of Weights & Biases that runs are shown in; null: none"
    )


class Recipe(Settings):
    """A whole chain, from captioned pictures to samples."""

    name: str = "dalle"
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    run: str = Field("runs/dalle", description="folder that the stages read from and write to by default")
    threads: Positive | None = Field(None, description="CPU threads of a stage; all cores by default")
    image_size: Positive = Field(256, description="pixels a side of the pictures that the dVAE sees")
    data: DataSettings = DataSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    dvae: DvaeSettings = DvaeSettings()
    prior: PriorSettings = PriorSettings()
    clip: ClipSettings = ClipSettings()
    sampling: SamplingSettings = SamplingSettings()
    monitoring: Monitoring = Monitoring()

    @property
    def grid(self) -> int:
        """Tokens of a picture's side."""
        return self.image_size // DOWNSAMPLING

    @model_validator(mode="after")
    def _stages_agree(self) -> Recipe:
        if self.image_size % DOWNSAMPLING:
            raise ValueError(f"image_size {self.image_size} is no multiple of {DOWNSAMPLING}")
        if self.prior.model.grid != self.grid:
            raise ValueError(
                f"prior.model.grid {self.prior.model.grid} is not image_size / {DOWNSAMPLING} = {self.grid}; "
                f"set prior.model.grid: {self.grid}"
            )
        if self.image_size % self.clip.model.patch_size:
            raise ValueError(
                f"clip.model.patch_size {self.clip.model.patch_size} does not divide image_size {self.image_size}"
            )
        return self
