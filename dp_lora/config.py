"""The typed configuration of one job: its schema, its checks and the fingerprint of a run.

YAML files under `conf/` choose values; every type, default and check is here. `check` refuses an
impossible value before any tensor exists. Checks that need the data (delta against the number of
images, batch against the number of images) or the model (rank against a layer's width) are made by
the module that has them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from dp_lora.errors import UserError, did_you_mean
from dp_lora.wandb_mode import MEANT

PROMPT = "a photo of a {}"
STAGES = ("pretrain", "finetune", "sample", "evaluate")
COMPONENTS = ("lora", "attention", "embedder", "bias", "norm", "full")
CLIPPINGS = ("flat", "automatic", "per_layer")
ADJACENCIES = ("zero_out", "add_or_remove")
PRECISIONS = ("float32", "bfloat16")
SAMPLERS = ("ddim", "dpmsolver++")
SCHEDULES = ("constant", "linear", "cosine")
DEVICES = ("auto", "cpu", "cuda")
RESAMPLINGS = ("pad", "box", "bilinear", "bicubic", "lanczos")
BACKGROUNDS = ("white", "grey", "black")
LAYOUTS = ("folders", "tables")
WANDB_MODES = ("auto", "online", "offline", "disabled")
AUTOENCODERS = ("kl", "vq")
CONDITIONINGS = ("class", "none")
TARGET_GROUPS = ("qkv", "proj", "self", "cross", "conv")
EXTRACTORS = ("lite0", "inception", "dinov2")
CLASSIFIERS = ("cnn", "wrn", "resnet", "resnext")
LARGEST_RATE = 1e9
"""AdamW moves a weight by about its learning rate in a step; far beyond this it overflows in float32."""
SMALLEST_EPSILON, LARGEST_EPSILON = 1e-9, 1e5
"""Where the accountants' numbers end: beyond them no noise multiplier is found, or one of almost nothing."""
LONGEST_TAG, LONGEST_PROJECT, NOT_IN_PROJECT = 64, 128, "/\\#?%:"
"""What W&B takes as tags and as the name of a project."""
FEWEST_RESAMPLES = 40
"""Below that, an interval of 95 % would lie beyond the smallest and the largest resample."""


@dataclass
class DataConfig:
    """One image set. The same schema serves the private set (`data`) and the public one (`public_data`)."""

    name: str = MISSING
    """Which loader: mnist5k, digits, mnist, fashion_mnist, letters, imagefolder, cifar10, celeba, celebahq,
    emnist_letters or imagenet."""
    public: bool = False
    """Whether anybody may see it: only then may losses on it be logged."""
    source: str | None = None
    """Folder, archive, parquet file or hub name, for loaders that read one; null takes what lies in
    `<paths.data>/<name>`."""
    image_size: int = 32
    """Side of the square images given to the model, in pixels."""
    channels: int = 1
    """1 for grey, 3 for RGB."""
    resample: str | None = None
    """How images come to `image_size`: box, bilinear, bicubic or lanczos; pad (28 x 28 into black margins);
    null takes what belongs to the set (docs/data.md)."""
    value_range: list[float] | None = None
    """The values of black and white in the image files, such as [0,4095] for 12 bits that lie in 16; null
    takes what a file's mode can hold: 255, or 65535 for 16 bits. Files of floating-point numbers and of 32
    bits have no such range and need one. It is never found from the images."""
    background: str = "white"
    """What images with transparency are laid on: white, grey, black, or a colour such as '#f0f0f0'."""
    layout: str | None = None
    """How a folder with both parquet tables and images is read: folders (a folder a class, whatever files lie
    beside them) or tables; null refuses what can be read in two ways."""
    attribute: str | None = None
    """CelebA and CelebA-HQ: the attribute that says the class, such as Male; null gives one class."""
    image_column: str | None = None
    """Tables: the column of the images; null takes `image` or `img`."""
    label_column: str | None = None
    """Tables: the column of the classes; null takes `attribute`, `label` or `labels`; none: one class."""
    caption_column: str | None = None
    """Tables: the column of the texts that a text-to-image model is trained with, each as private as its
    image; null takes `model.prompt` with the name of the class. Images are drawn by `model.prompt`."""
    classes: list[str] | None = None
    """Keep only these classes, in this order; null keeps all."""
    train_size: int | float | None = None
    """How many of the training images to take or to render; null takes all. Like the next two: of a
    published set a number of images, balanced over classes or stratified, or a fraction; of a set of one's
    own a fraction between 0 and 1, by which each image is taken for its own pixels (docs/data.md)."""
    validation_size: int | float = 0
    """How many images are set aside for choices that must not see the test set."""
    test_size: int | float = 0
    """How many images are for testing, for sets that come without a split of their own."""


@dataclass
class AutoencoderConfig:
    """A diffusers AutoencoderKL or VQModel."""

    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 64])
    layers_per_block: int = 1
    norm_num_groups: int = 16
    kind: str = "kl"
    """kl: a Gaussian posterior; vq: the nearest of `num_codes` vectors."""
    attention: list[bool] = field(default_factory=list)
    """Whether each level has attention; empty: none has."""
    mid_attention: bool = False
    """Whether the middle blocks have attention; those of CompVis have."""
    num_codes: int = 8192
    """Only for vq."""


@dataclass
class UNetConfig:
    """A diffusers UNet2DConditionModel with one class token as its condition, or a UNet2DModel without."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])
    attention: list[bool] = field(default_factory=lambda: [True, True])
    """Whether each level has attention; the middle block always has."""
    layers_per_block: int = 1
    cross_attention_dim: int = 64
    """Width of the class token."""
    num_heads: int = 8
    """Attention heads of every level."""
    head_dim: int | None = None
    """Channels a head, in place of `num_heads`."""
    norm_num_groups: int = 32
    scale_shift_norm: bool = False
    """The timestep scales and shifts the second norm of a residual block; false adds it before that norm."""
    resnet_updown: bool = False
    """Residual blocks halve and double the resolution; false leaves that to convolutions."""


@dataclass
class SchedulerConfig:
    """The forward diffusion process (eps-prediction)."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    beta_schedule: str = "scaled_linear"


@dataclass
class PretrainConfig:
    """Public pre-training of the autoencoder, then of the diffusion model on its latents."""

    autoencoder_steps: int = 2000
    autoencoder_batch_size: int = 64
    autoencoder_learning_rate: float = 1e-3
    reconstruction: str = "mse"
    """Error of the pixels: mse, or l1 as in latent diffusion."""
    kl_weight: float = 1e-6
    """Of the divergence from N(0, I) for each value of an image; only for kl autoencoders."""
    codebook_weight: float = 1.0
    """Of the distance to the nearest code; only for vq autoencoders."""
    perceptual_weight: float = 0.0
    """Of the distance between features; 0 leaves it out."""
    perceptual_network: str = "lite0"
    """Whose features: lite0, or a file with torchvision's weights of vgg16."""
    adversarial_weight: float = 0.0
    """Of a patch discriminator, times the weight at which both gradients are as long; 0 leaves it out."""
    adversarial_start: int = 0
    """Number of the step from which the discriminator takes part."""
    decoder_steps: int = 0
    """Steps of the decoder alone at the end, which make plain backgrounds exactly plain."""
    unet_steps: int = 4000
    unet_batch_size: int = 256
    unet_learning_rate: float = 1e-3
    ema_decay: float = 0.999
    """Of the moving average of the diffusion model's weights, which is what is kept."""
    schedule: str = "cosine"
    """Learning rates over the steps: constant, linear or cosine to zero."""
    warmup_steps: int = 100
    precision: str = "float32"
    """float32, or bfloat16 where that is safe (autocast); weights stay float32."""
    compile: bool = False
    """torch.compile of the networks that are trained."""
    samples_every: int = 0
    """Steps between two pictures of the public set and of samples, in `samples/` of the model; 0: none."""


@dataclass
class ModelConfig:
    """A latent diffusion model and how it comes by its weights."""

    name: str = MISSING
    pretrained: str | None = None
    """Folder with weights in diffusers form (one of ours, or a pipeline's), the name of weights that ship
    with the package, or the name of a pipeline on the hub; null pre-trains on `public_data` once and keeps
    the result in `paths.cache`."""
    prompt: str = PROMPT
    """What a text-to-image model is told of an image, with {} for the name of its class."""
    conditioning: str = "class"
    """class: one learnt token a class; none: the model is unconditional."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)


@dataclass
class TrainableConfig:
    """Which parameters the private fine-tuning trains; everything else stays frozen."""

    components: list[str] = field(default_factory=lambda: ["lora", "embedder"])
    """Any of lora, attention, embedder, bias, norm, full."""
    learning_rate_factor: float = 1.0
    """The learning rate of these over `train.learning_rate`; the class embedding has a factor of its own.
    Whole weights take smaller steps than adapters."""


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W + (alpha / rank) B A."""

    rank: int = 8
    alpha: float | None = None
    """null: alpha = rank, so that the adapter's scale is 1."""
    target_modules: list[str] = field(default_factory=lambda: ["qkv", "proj"])
    """Which modules get an adapter: qkv, proj (of all attention), self, cross (both of one kind of
    attention), conv (of the residual blocks and resamplers), or ends of their names such as to_out.0."""
    cap_rank: bool = False
    """A layer narrower than `rank` takes its width as its rank; false refuses such a rank."""


@dataclass
class PrivacyConfig:
    """The guarantee. Of epsilon, noise multiplier and number of steps, two determine the third."""

    epsilon: float | None = 10.0
    """Target; null reports what a fixed noise multiplier spends; inf is the non-private baseline."""
    delta: float = 1e-5
    noise_multiplier: float | None = None
    """Standard deviation of the noise over the clipping norm; null finds the smallest that meets epsilon."""
    noise_multiplicity: int = 2
    """Draws of (timestep, noise) per example, averaged before the clip: compute, not privacy."""
    max_grad_norm: float = 1e-3
    """C, the norm to which one example's gradient is clipped."""
    clipping: str = "flat"
    adjacency: str = "zero_out"
    """Which sets are neighbours; both have the same epsilon. zero_out: one image contributes nothing, and the
    number of images is public. add_or_remove: one image more or less; the number of images is private, so
    `train.sample_rate` has to be given and nothing that is released depends on the number."""
    insecure_seed: int | None = None
    """Derives all private randomness from a number, for tests; no privacy against whoever knows it."""
    budget_epsilon: float | None = None
    """What all runs on the private set may spend together, at `delta`; one that would pass it is refused."""


@dataclass
class TrainConfig:
    """The private fine-tuning, apart from its privacy."""

    expected_batch_size: int = 1000
    """What the noised sum of a step is divided by. Under privacy.adjacency=zero_out it is q N, the mean size
    of a Poisson batch, and determines q; under add_or_remove it is a constant beside `sample_rate`."""
    sample_rate: float | None = None
    """q, the probability with which an image joins a batch, where privacy.adjacency=add_or_remove; null under
    zero_out. Choose it without counting the images."""
    max_steps: int | None = 80
    """Number of noisy steps; with `epochs` given too, the smaller; null with a fixed noise multiplier
    takes as many as epsilon allows."""
    epochs: float | None = None
    learning_rate: float = 1e-2
    embedder_learning_rate_factor: float = 1.0
    """The class embedding's learning rate over that of the rest: new classes have a longer way to go."""
    schedule: str = "constant"
    """Learning rate over the steps: constant, linear or cosine to zero."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    """Decay of the moving average of the released weights, once per batch; 0 releases the last ones."""
    stratified_timesteps: bool = True
    """Spread an example's k timesteps over k equal parts of the range; false draws them independently."""
    precision: str = "float32"
    microbatch: int | str = "auto"
    """Examples per forward and backward, or 'auto': the largest that fits and is worth it."""
    channels_last: bool = False
    """Keeps the UNet's images with their channels innermost, which tensor cores like and CPUs do not."""
    compile: bool = False
    """Compiles the UNet's frozen parts: a minute or two at the start of every job."""
    checkpoint_minutes: float = 0.5
    """Time between checkpoints."""


@dataclass
class SamplerConfig:
    """How images are drawn from the fine-tuned model."""

    name: str = "dpmsolver++"
    steps: int = 15
    eta: float = 0.0
    """DDIM only: 0 is deterministic, 1 is the paper's choice."""
    guidance: float = 1.0
    """How far an image is pushed from the mean class towards its own; 1 is the paper's choice: not at all."""
    num_samples: int = 4000
    batch_size: int = 250


@dataclass
class EvaluationConfig:
    """What is measured on the generated images."""

    extractors: list[str] = field(default_factory=lambda: ["lite0"])
    """Whose features the images are compared by: lite0, inception (FID and Inception score), dinov2."""
    inception_weights: str | None = None
    """File pt_inception-2015-12-05-6726825d.pth; null takes the one in torch's hub folder, or fetches it."""
    dinov2: str = "facebook/dinov2-large"
    """A DINOv2 model by its name on the hub, or a folder."""
    reference: str = "test"
    """Which real images the distances compare with: train, validation or test."""
    classifiers: list[str] = field(default_factory=lambda: ["cnn"])
    """What is trained on the generated images and tested on real ones: cnn; wrn, resnet and resnext take a
    GPU."""
    classifier_epochs: int = 10
    """Passes of the CNN over the generated images."""
    deep_classifier_epochs: int = 50
    """Passes of wrn, resnet and resnext."""
    bootstrap: int = 0
    """Resamples behind the intervals of the metrics; 0: no intervals."""
    fid_infinity: bool = False
    """Also the Frechet distances extrapolated to infinitely many images."""
    release: str = "none"
    """none: metrics carry no noise and are not covered by epsilon; dp: only what is covered by a budget of
    its own, `release_epsilon` at `release_delta`."""
    release_epsilon: float = 1.0
    release_delta: float | None = None
    """null: privacy.delta."""
    batch_size: int = 250


@dataclass
class TrackingConfig:
    """metrics.jsonl and privacy.json are always written; W&B mirrors them."""

    wandb: str = "auto"
    """auto: online when an API key is there, else offline; or online, offline, disabled."""
    project: str = "dp-lora"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    private_loss: bool = False
    """Logs the training loss as read from the noised sum: inside the same epsilon, at a little more noise."""
    live: bool = False
    """Shows a private job in W&B while it trains, not only when its training has ended. When rows arrive
    tells how long steps take, which follows the sizes of private batches; privacy.json then says so."""
    log_every: int = 1
    progress: str = "auto"
    """auto: a bar on a terminal, plain lines elsewhere; or bar, lines, off."""


@dataclass
class ResourcesConfig:
    """What one job may use and what it asks a cluster for; none of it changes the result."""

    device: str = "auto"
    threads: int | None = None
    """CPU threads of torch; null takes its own choice."""
    nodes: int = 1
    gpus: int = 0
    """GPUs per node."""
    processes: int | None = None
    """Processes per node, which share each batch; null takes one for each GPU, or one."""
    cpus: int = 2
    """CPU cores per process."""
    memory_gb: float = 8.0
    """Memory per node."""
    time_limit_min: int = 240
    """Minutes until SLURM stops the job, which is then continued; short ones start earlier."""
    partition: str | None = None
    """Of SLURM, like the next three; null takes the cluster's default."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: dict[str, str] = field(default_factory=dict)
    """Other options of sbatch, by their long names: {reservation: night}."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that a job begins with, such as `module load cuda`."""

    @property
    def processes_per_node(self) -> int:
        """Number of processes of the job on each of its nodes."""
        return self.processes if self.processes is not None else max(1, self.gpus)


@dataclass
class PathsConfig:
    """The three folders that a job writes or reads, and where it finds what was spent on its private set."""

    outputs: str = "outputs"
    cache: str = "~/.cache/dp_lora"
    data: str = "~/.cache/dp_lora/data"
    ledger: str | None = None
    """File of the ledger of what was spent; null takes the one beside the data (docs/privacy-bill.md)."""
    index: str | None = None
    """Folder of the index by which private images are known again wherever they lie; null takes
    `$XDG_DATA_HOME/dp_lora/image_index`, or `~/.local/share/dp_lora/image_index`."""


@dataclass
class Config:
    """One job."""

    experiment: str = "default"
    """First folder under `paths.outputs`."""
    stages: list[str] = field(default_factory=lambda: ["finetune", "sample", "evaluate"])
    seed: int = 0
    """Of what is public: initialisation, sampling, evaluation. Never of private randomness."""
    data: DataConfig = field(default_factory=DataConfig)
    public_data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


def from_omegaconf(composed: DictConfig) -> Config:
    """The composed configuration as a checked, typed `Config`.

    Raises UserError when a field is missing or `check` refuses a value.
    """
    # As plain values: merging one typed configuration into another lets unknown fields pass.
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    merged = OmegaConf.merge(_schema(), plain)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{missing[0]}: no value given")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config)
    return config


@functools.cache
def _schema() -> DictConfig:
    """Of `Config`; making it takes longer than filling it, and a sweep has hundreds of jobs."""
    return OmegaConf.structured(Config)  # type: ignore[no-any-return]


def check(config: Config) -> None:
    """Raises UserError naming field, value and range for the first value that cannot be right."""
    _check_texts(config, "")
    _check_choices(config)
    _check_privacy(config.privacy)
    _check_train(config.train, config.privacy)
    _check_relation(config.train, config.data, config.privacy.adjacency)
    _check_counts(config)
    _check_evaluation(config.evaluation)
    _check_tracking(config.tracking)
    _check_model(config.model)
    for name in ("data", "public_data"):
        data: DataConfig = getattr(config, name)
        _check_data(name, data)
        if data.channels not in (1, 3):
            raise UserError(f"{name}.channels={data.channels}: expected 1 (grey) or 3 (RGB)")
        if data.resample is not None and data.resample not in RESAMPLINGS:
            hint = did_you_mean(data.resample, RESAMPLINGS)
            raise UserError(
                f"{name}.resample={data.resample!r}: expected one of {', '.join(RESAMPLINGS)}, or null{hint}"
            )
    if config.public_data.caption_column is not None:
        raise UserError(
            f"public_data.caption_column={config.public_data.caption_column}: pre-training knows classes, "
            "expected null"
        )
    if not config.public_data.public:
        raise UserError(
            f"public_data.public=false ({config.public_data.name}): pre-training has no privacy and "
            "takes public images only"
        )
    if not re.fullmatch(r"[\w.-]+", config.experiment):
        raise UserError(f"experiment={config.experiment!r}: expected letters, digits, '_', '-' or '.'")


def _check_data(name: str, data: DataConfig) -> None:
    for part in ("train_size", "validation_size", "test_size"):
        size = getattr(data, part)
        if isinstance(size, float) and not 0 < size < 1:
            raise UserError(f"{name}.{part}={size}: expected a whole number, or a fraction between 0 and 1")
        least = 1 if part == "train_size" else 0
        if isinstance(size, int) and size < least:
            raise UserError(f"{name}.{part}={size}: expected at least {least}, or a fraction")
    values = data.value_range
    if values is not None and (
        len(values) != 2 or not all(map(math.isfinite, values)) or not values[0] < values[1]
    ):
        raise UserError(
            f"{name}.value_range={values}: expected the values of black and of white, such as [0,4095], or "
            "null"
        )
    if not re.fullmatch("|".join((*BACKGROUNDS, "#[0-9a-fA-F]{6}")), data.background):
        hint = did_you_mean(data.background, BACKGROUNDS)
        raise UserError(
            f"{name}.background={data.background!r}: expected white, grey, black or a colour such as "
            f"'#f0f0f0'{hint}"
        )
    if data.layout is not None and data.layout not in LAYOUTS:
        hint = did_you_mean(data.layout, LAYOUTS)
        raise UserError(f"{name}.layout={data.layout!r}: expected one of {', '.join(LAYOUTS)}, or null{hint}")


def _check_texts(section: Any, prefix: str) -> None:
    """Refuses empty texts: shells make one of a variable that is not set, and as a path it is this folder."""
    for known in dataclasses.fields(section):
        value = getattr(section, known.name)
        if dataclasses.is_dataclass(value):
            _check_texts(value, f"{prefix}{known.name}.")
        elif value == "":
            rest = ", or null" if "None" in str(known.type) else ""
            raise UserError(f'{prefix}{known.name}="": expected a text that is not empty{rest}')


def _check_tracking(tracking: TrackingConfig) -> None:
    """Refuses what W&B would refuse, with the run's whole record lost, once the run has begun."""
    if len(tracking.project) > LONGEST_PROJECT or set(tracking.project) & set(NOT_IN_PROJECT):
        raise UserError(
            f"tracking.project={tracking.project!r}: expected at most {LONGEST_PROJECT} characters, none of "
            f"them in {NOT_IN_PROJECT}"
        )
    for tag in tracking.tags:
        if not 1 <= len(tag) <= LONGEST_TAG:
            raise UserError(
                f"tracking.tags={tag!r}: {len(tag)} characters, expected 1 to {LONGEST_TAG} a tag"
            )


def _check_choices(config: Config) -> None:
    choices: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("stages", config.stages, STAGES),
        ("trainable.components", config.trainable.components, COMPONENTS),
        ("privacy.clipping", [config.privacy.clipping], CLIPPINGS),
        ("privacy.adjacency", [config.privacy.adjacency], ADJACENCIES),
        ("train.precision", [config.train.precision], PRECISIONS),
        ("train.schedule", [config.train.schedule], SCHEDULES),
        ("model.conditioning", [config.model.conditioning], CONDITIONINGS),
        ("model.autoencoder.kind", [config.model.autoencoder.kind], AUTOENCODERS),
        ("model.pretrain.schedule", [config.model.pretrain.schedule], SCHEDULES),
        ("model.pretrain.precision", [config.model.pretrain.precision], PRECISIONS),
        ("model.pretrain.reconstruction", [config.model.pretrain.reconstruction], ("mse", "l1")),
        ("sampler.name", [config.sampler.name], SAMPLERS),
        ("evaluation.reference", [config.evaluation.reference], ("train", "validation", "test")),
        ("evaluation.release", [config.evaluation.release], ("none", "dp")),
        ("tracking.wandb", [config.tracking.wandb], WANDB_MODES),
        ("tracking.progress", [config.tracking.progress], ("auto", "bar", "lines", "off")),
        ("resources.device", [config.resources.device], DEVICES),
    ]
    for name, values, options in choices:
        if not values:
            raise UserError(f"{name}=[]: expected at least one of {', '.join(options)}")
        for value in values:
            if value not in options:
                meant = MEANT.get(value.lower(), value) if name == "tracking.wandb" else value
                hint = did_you_mean(meant, options)
                raise UserError(f"{name}={value!r}: expected one of {', '.join(options)}{hint}")


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    for name in evaluation.extractors:
        if name not in EXTRACTORS:
            hint = did_you_mean(name, EXTRACTORS)
            raise UserError(f"evaluation.extractors={name!r}: expected one of {', '.join(EXTRACTORS)}{hint}")
    for name in evaluation.classifiers:
        if name not in CLASSIFIERS:
            hint = did_you_mean(name, CLASSIFIERS)
            raise UserError(
                f"evaluation.classifiers={name!r}: expected one of {', '.join(CLASSIFIERS)}{hint}"
            )
    if not evaluation.extractors and not evaluation.classifiers:
        raise UserError("evaluation.extractors=[] with evaluation.classifiers=[]: expected one of them")
    if evaluation.bootstrap and evaluation.bootstrap < FEWEST_RESAMPLES:
        raise UserError(
            f"evaluation.bootstrap={evaluation.bootstrap}: expected 0 (no intervals) or at least "
            f"{FEWEST_RESAMPLES} resamples"
        )
    epsilon, delta = evaluation.release_epsilon, evaluation.release_delta
    if not 0 < epsilon < math.inf:
        raise UserError(f"evaluation.release_epsilon={epsilon}: expected a finite number above 0")
    if not SMALLEST_EPSILON <= epsilon <= LARGEST_EPSILON:
        raise UserError(
            f"evaluation.release_epsilon={epsilon:g}: expected a number from {SMALLEST_EPSILON:g} to "
            f"{LARGEST_EPSILON:g}"
        )
    if delta is not None and not 0 < delta < 1:
        raise UserError(f"evaluation.release_delta={delta}: expected a number between 0 and 1, or null")
    if evaluation.release == "dp" and evaluation.reference == "train":
        raise UserError(
            "evaluation.release=dp with evaluation.reference=train: expected test or validation, images that "
            "took no part in the training"
        )


def _check_model(model: ModelConfig) -> None:
    levels, given = len(model.unet.block_out_channels), len(model.unet.attention)
    if levels != given:
        raise UserError(f"model.unet.attention: {given} values, expected one a level, {levels}")
    levels, given = len(model.autoencoder.block_out_channels), len(model.autoencoder.attention)
    if given not in (0, levels):
        raise UserError(
            f"model.autoencoder.attention: {given} values, expected one a level, {levels}, or none"
        )
    heads, dim = model.unet.num_heads, model.unet.head_dim
    for name, value in (("num_heads", heads), ("head_dim", dim)):
        if value is not None and value < 1:
            raise UserError(f"model.unet.{name}={value}: expected at least 1")
    for channels, attends in zip(model.unet.block_out_channels, model.unet.attention, strict=True):
        field_of, size = ("num_heads", heads) if dim is None else ("head_dim", dim)
        if attends and channels % size:
            raise UserError(
                f"model.unet.{field_of}={size}: expected a divisor of each level's {channels} channels"
            )


def _check_privacy(privacy: PrivacyConfig) -> None:
    epsilon, sigma = privacy.epsilon, privacy.noise_multiplier
    if epsilon is not None and not epsilon > 0:
        raise UserError(f"privacy.epsilon={epsilon}: expected a number above 0, inf or null")
    if epsilon is not None and epsilon < math.inf and not SMALLEST_EPSILON <= epsilon <= LARGEST_EPSILON:
        raise UserError(
            f"privacy.epsilon={epsilon:g}: expected a number from {SMALLEST_EPSILON:g} to "
            f"{LARGEST_EPSILON:g}, inf (no noise) or null"
        )
    if not 0 < privacy.delta < 1:
        raise UserError(f"privacy.delta={privacy.delta}: expected a number between 0 and 1, below 1/N")
    if sigma is not None and not (0 < sigma < math.inf):
        raise UserError(f"privacy.noise_multiplier={sigma}: expected a finite number above 0, or null")
    if epsilon is None and sigma is None:
        raise UserError("privacy.epsilon=null with privacy.noise_multiplier=null: expected one of the two")
    if epsilon == math.inf and sigma is not None:
        raise UserError(
            f"privacy.epsilon=inf with privacy.noise_multiplier={sigma}: the non-private baseline has no "
            "noise; use epsilon=none to report what a fixed noise multiplier spends"
        )
    budget = privacy.budget_epsilon
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"privacy.budget_epsilon={budget}: expected a finite number above 0, or null")
    if privacy.noise_multiplicity < 1:
        raise UserError(f"privacy.noise_multiplicity={privacy.noise_multiplicity}: expected at least 1")
    if not 0 < privacy.max_grad_norm < math.inf:
        raise UserError(f"privacy.max_grad_norm={privacy.max_grad_norm}: expected a finite number above 0")


def _check_train(train: TrainConfig, privacy: PrivacyConfig) -> None:
    if isinstance(train.microbatch, str) and train.microbatch != "auto":
        raise UserError(f"train.microbatch={train.microbatch!r}: expected 'auto' or a positive integer")
    if isinstance(train.microbatch, int) and train.microbatch < 1:
        raise UserError(f"train.microbatch={train.microbatch}: expected 'auto' or a positive integer")
    if train.max_steps is None and train.epochs is None and privacy.noise_multiplier is None:
        raise UserError(
            "train.max_steps=null with train.epochs=null and privacy.noise_multiplier=null: "
            "expected a number of steps or a noise multiplier"
        )
    if train.max_steps is None and train.epochs is None and privacy.epsilon is None:
        raise UserError(
            "train.max_steps=null with train.epochs=null and privacy.epsilon=null: expected a number of "
            "steps or an epsilon at which to stop"
        )
    if train.epochs is not None and not 0 < train.epochs < math.inf:
        raise UserError(f"train.epochs={train.epochs}: expected a number above 0, or null")
    if not 0 < train.learning_rate <= LARGEST_RATE:
        raise UserError(
            f"train.learning_rate={train.learning_rate}: expected a number above 0, at most {LARGEST_RATE:g}"
        )
    factor = train.embedder_learning_rate_factor
    if factor * train.learning_rate > LARGEST_RATE:
        raise UserError(
            f"train.embedder_learning_rate_factor={factor}: with train.learning_rate={train.learning_rate} "
            f"expected a product of at most {LARGEST_RATE:g}"
        )
    for name in ("weight_decay", "checkpoint_minutes", "warmup_steps", "embedder_learning_rate_factor"):
        if not 0 <= getattr(train, name) < math.inf:
            raise UserError(f"train.{name}={getattr(train, name)}: expected at least 0")
    if not 0 <= train.ema_decay < 1:
        raise UserError(f"train.ema_decay={train.ema_decay}: expected a number in [0, 1)")


def _check_relation(train: TrainConfig, data: DataConfig, adjacency: str) -> None:
    rate = train.sample_rate
    if rate is not None and not 0 < rate <= 1:
        raise UserError(f"train.sample_rate={rate}: expected a number in (0, 1], or null")
    if adjacency != "add_or_remove":
        if rate is not None:
            raise UserError(
                f"train.sample_rate={rate} with privacy.adjacency={adjacency}: expected null, since the rate "
                "is train.expected_batch_size over the public number of images"
            )
        return
    if rate is None:
        raise UserError(
            "train.sample_rate=null with privacy.adjacency=add_or_remove: expected a number in (0, 1] beside "
            "train.expected_batch_size, since the rate must not follow from the private number of images"
        )
    if train.epochs is not None:
        raise UserError(
            f"train.epochs={train.epochs} with privacy.adjacency=add_or_remove: expected null and "
            "train.max_steps, since the number of steps must not follow from the private number of images"
        )
    if isinstance(data.train_size, int) and not data.public:
        raise UserError(
            f"data.train_size={data.train_size} with privacy.adjacency=add_or_remove: expected null or a "
            "fraction, since the number of images is private, and where one is missing another would come in"
        )


def _check_counts(config: Config) -> None:
    at_least_one = {
        "train.max_steps": config.train.max_steps,
        "train.expected_batch_size": config.train.expected_batch_size,
        "lora.rank": config.lora.rank,
        "sampler.steps": config.sampler.steps,
        "sampler.num_samples": config.sampler.num_samples,
        "sampler.batch_size": config.sampler.batch_size,
        "evaluation.classifier_epochs": config.evaluation.classifier_epochs,
        "evaluation.deep_classifier_epochs": config.evaluation.deep_classifier_epochs,
        "evaluation.batch_size": config.evaluation.batch_size,
        "tracking.log_every": config.tracking.log_every,
        "resources.threads": config.resources.threads,
        "resources.nodes": config.resources.nodes,
        "resources.processes": config.resources.processes,
        "resources.cpus": config.resources.cpus,
        "resources.time_limit_min": config.resources.time_limit_min,
        "model.pretrain.autoencoder_steps": config.model.pretrain.autoencoder_steps,
        "model.pretrain.unet_steps": config.model.pretrain.unet_steps,
        "model.pretrain.autoencoder_batch_size": config.model.pretrain.autoencoder_batch_size,
        "model.pretrain.unet_batch_size": config.model.pretrain.unet_batch_size,
        "data.image_size": config.data.image_size,
        "public_data.image_size": config.public_data.image_size,
    }
    for name, value in at_least_one.items():
        if value is not None and not value >= 1:
            raise UserError(f"{name}={value}: expected at least 1")
    factor = config.trainable.learning_rate_factor
    if not 0 < factor < math.inf:
        raise UserError(f"trainable.learning_rate_factor={factor}: expected a finite number above 0")
    if factor * config.train.learning_rate > LARGEST_RATE:
        raise UserError(
            f"trainable.learning_rate_factor={factor}: with train.learning_rate={config.train.learning_rate} "
            f"expected a product of at most {LARGEST_RATE:g}"
        )
    if config.resources.gpus < 0:
        raise UserError(f"resources.gpus={config.resources.gpus}: expected at least 0")
    if not 0 < config.resources.memory_gb < math.inf:
        raise UserError(f"resources.memory_gb={config.resources.memory_gb}: expected a number above 0")
    _check_pretrain(config.model.pretrain)
    if config.lora.alpha is not None and not 0 < config.lora.alpha < math.inf:
        raise UserError(f"lora.alpha={config.lora.alpha}: expected a finite number above 0, or null")
    if not config.lora.target_modules and "lora" in config.trainable.components:
        raise UserError(
            f"lora.target_modules=[]: expected at least one of {', '.join(TARGET_GROUPS)} or an end of a "
            "module's name"
        )
    if "{}" not in config.model.prompt:
        raise UserError(f"model.prompt={config.model.prompt!r}: expected {{}} for the name of the class")
    if config.seed < 0:
        raise UserError(f"seed={config.seed}: expected at least 0")
    if not 0 <= config.sampler.guidance < math.inf:
        raise UserError(f"sampler.guidance={config.sampler.guidance}: expected a finite number, at least 0")
    if not 0 <= config.sampler.eta <= 1:
        raise UserError(f"sampler.eta={config.sampler.eta}: expected a number in [0, 1]")


def _check_pretrain(pretrain: PretrainConfig) -> None:
    for name in ("autoencoder_learning_rate", "unet_learning_rate"):
        if not 0 < getattr(pretrain, name) <= LARGEST_RATE:
            raise UserError(
                f"model.pretrain.{name}={getattr(pretrain, name)}: expected a number above 0, at most "
                f"{LARGEST_RATE:g}"
            )
    for name in ("kl_weight", "codebook_weight", "perceptual_weight", "adversarial_weight",
                 "adversarial_start", "decoder_steps", "warmup_steps", "samples_every"):  # fmt: skip
        if not 0 <= getattr(pretrain, name) < math.inf:
            raise UserError(
                f"model.pretrain.{name}={getattr(pretrain, name)}: expected a finite number, at least 0"
            )
    if not 0 <= pretrain.ema_decay < 1:
        raise UserError(f"model.pretrain.ema_decay={pretrain.ema_decay}: expected a number in [0, 1)")


PRIVATE_SETTINGS = (
    "data.source",
    "public_data.source",
    "model.pretrained",
    "model.pretrain.perceptual_network",
    "privacy.insecure_seed",
    "evaluation.inception_weights",
    "evaluation.dinov2",
    "paths",
    *(f"resources.{name}" for name in ("partition", "account", "qos", "constraint", "sbatch", "setup")),
)
"""Settings that no name of a run tells and that never leave: they can name people, folders and accounts, or
take the noise away."""

_CANNOT_CHANGE_THE_RESULT = ("experiment", "stages", "tracking", "resources", "paths")
_NOR_CAN = ("microbatch", "channels_last", "compile", "checkpoint_minutes")
"""Of `train`."""


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of what can change the result of a run.

    Device, threads, tracking, launcher and paths are not part of it, so the same run asked for twice
    has the same directory wherever it runs. Whoever knows the other settings can confirm a guess of one by
    it, so what leaves carries that of `manifest.shown_fingerprint` alone.
    """
    values = dataclasses.asdict(config)
    for name in _CANNOT_CHANGE_THE_RESULT:
        del values[name]
    # Of tracking, it alone changes the released values.
    values["private_loss"] = config.tracking.private_loss
    for name in _NOR_CAN:
        del values["train"][name]
    del values["privacy"]["budget_epsilon"]
    del values["model"]["pretrain"]["samples_every"]
    # Where the published file lies: what is in it is fixed.
    del values["evaluation"]["inception_weights"]
    for group, name in (("data", "source"), ("public_data", "source"), ("model", "pretrained")):
        values[group][name] = _one_spelling(values[group][name])
    return _digest(values)


def _one_spelling(place: str | None) -> str | None:
    """The same for all spellings of one path that mean the same place wherever it is.

    >>> _one_spelling("set/"), _one_spelling("./set//."), _one_spelling("uoft-cs/cifar10")
    ('set', 'set', 'uoft-cs/cifar10')
    """
    return str(PurePosixPath(place)) if place else place


def pretrained_fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of what can change the weights of a public pre-training."""
    model = dataclasses.asdict(config.model)
    del model["pretrained"], model["prompt"], model["pretrain"]["samples_every"]
    public = dataclasses.asdict(config.public_data)
    public["source"] = _one_spelling(public["source"])
    # As long as they say what was done before they were there, models that are kept stay what they are.
    for name, value in (("value_range", None), ("background", "white"), ("layout", None)):
        if public[name] == value:
            del public[name]
    return _digest({"model": model, "public_data": public, "seed": config.seed})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def run_directory(config: Config, overrides: Sequence[str]) -> Path:
    """`<paths.outputs>/<experiment>/<readable overrides>-<fingerprint8>`.

    Args:
        config: the job.
        overrides: the command line's `key=value` words; those that cannot change the result, and those of
            `PRIVATE_SETTINGS`, are left out. A directory of the same run that was asked for in other words
            is taken again.
    """
    folder = Path(config.paths.outputs).expanduser() / config.experiment
    identity = fingerprint(config)
    # Not glob, which takes several times as long, and a sweep asks once for each of its cells.
    names = os.listdir(folder) if folder.is_dir() else []
    if said_otherwise := sorted(name for name in names if name.endswith(f"-{identity}")):
        return folder / said_otherwise[0]
    return folder / f"{readable(overrides)}-{identity}"


def readable(overrides: Sequence[str]) -> str:
    """What of the command line's words can change the result and may be shown, as part of a name.

    >>> readable(["seed=1", "data.source=/home/ann/patients", "lora.rank=4", "tracking.tags=[a]"])
    'lora.rank=4,seed=1'
    """
    without_effect = (
        *(*_CANNOT_CHANGE_THE_RESULT, "cluster", "sweep"),
        *("privacy.budget_epsilon", "evaluation.inception_weights"),
        *(f"train.{name}" for name in _NOR_CAN),
    )
    words = [word.replace("'", "") for word in overrides]
    said = [word.lstrip("+~") for word in words if not word.lstrip("+~").startswith(without_effect)]
    shown = sorted(word for word in said if _may_be_shown(word))
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(shown)).strip("_")[:120] or "defaults"


def _may_be_shown(word: str) -> bool:
    """Whether a word sets one plain value that is neither private nor a path."""
    name, _, value = word.partition("=")
    private = any(f"{name}.".startswith(f"{setting}.") for setting in PRIVATE_SETTINGS)
    return not private and not re.search(r"[/~\\{$]", value)


def config_directory() -> Path:
    """The folder of the YAML files: `conf/` of the checkout, else the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").exists() else package / "conf"
