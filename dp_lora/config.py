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
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from dp_lora.errors import UserError, did_you_mean

STAGES = ("pretrain", "finetune", "sample", "evaluate")
COMPONENTS = ("lora", "attention", "embedder", "bias", "norm", "full")
CLIPPINGS = ("flat", "automatic", "per_layer")
PRECISIONS = ("float32", "bfloat16")
SAMPLERS = ("ddim", "dpmsolver++")
SCHEDULES = ("constant", "linear", "cosine")
DEVICES = ("auto", "cpu", "cuda")
WANDB_MODES = ("auto", "online", "offline", "disabled")


@dataclass
class DataConfig:
    """One image set. The same schema serves the private set (`data`) and the public one (`public_data`)."""

    name: str = MISSING
    """Which loader: mnist5k, digits, mnist, fashion_mnist, letters or imagefolder."""
    public: bool = False
    """Whether anybody may see it: only then may losses on it be logged."""
    source: str | None = None
    """Folder or hub name, for loaders that read one."""
    image_size: int = 32
    """Side of the square images given to the model, in pixels."""
    channels: int = 1
    """1 for grey, 3 for RGB."""
    classes: list[str] | None = None
    """Keep only these classes, in this order; null keeps all."""
    train_size: int | None = None
    """Number of training images to take or to render, balanced over classes; null takes all."""
    validation_size: int = 0
    """Number of training images set aside, stratified, for choices that must not see the test set."""
    test_size: int = 0
    """Number of test images, for sets that come without a split of their own."""


@dataclass
class AutoencoderConfig:
    """A diffusers AutoencoderKL."""

    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 64])
    layers_per_block: int = 1
    norm_num_groups: int = 16


@dataclass
class UNetConfig:
    """A diffusers UNet2DConditionModel whose condition is one class token."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])
    attention: list[bool] = field(default_factory=lambda: [True, True])
    """Whether each level has attention; the middle block always has."""
    layers_per_block: int = 1
    cross_attention_dim: int = 64
    attention_head_dim: int = 8
    norm_num_groups: int = 32


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
    kl_weight: float = 1e-6
    decoder_steps: int = 0
    """Steps of the decoder alone at the end, which make plain backgrounds exactly plain."""
    unet_steps: int = 4000
    unet_batch_size: int = 256
    unet_learning_rate: float = 1e-3
    ema_decay: float = 0.999


@dataclass
class ModelConfig:
    """A latent diffusion model and how it comes by its weights."""

    name: str = MISSING
    pretrained: str | None = None
    """Folder with weights in diffusers form, or the name of weights that ship with the package;
    null pre-trains on `public_data` once and keeps the result in `paths.cache`."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)


@dataclass
class TrainableConfig:
    """Which parameters the private fine-tuning trains; everything else stays frozen."""

    components: list[str] = field(default_factory=lambda: ["lora", "embedder"])
    """Any of lora, attention, embedder, bias, norm, full."""


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W + (alpha / rank) B A."""

    rank: int = 8
    alpha: float | None = None
    """null: alpha = rank, so that the adapter's scale is 1."""
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Ends of the names of the modules that get an adapter."""


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
    insecure_seed: int | None = None
    """Derives all private randomness from a number, for tests; no privacy against whoever knows it."""


@dataclass
class TrainConfig:
    """The private fine-tuning, apart from its privacy."""

    expected_batch_size: int = 1000
    """q N: the mean size of a Poisson batch."""
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
    """Examples per forward and backward, or 'auto'."""
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
    """Feature extractors for the Frechet distance and KID."""
    reference: str = "test"
    """Which real images the distances compare with: train, validation or test."""
    classifier_epochs: int = 10
    """Passes of the CNN over the generated images."""
    batch_size: int = 250


@dataclass
class TrackingConfig:
    """metrics.jsonl and privacy.json are always written; W&B mirrors them."""

    wandb: str = "auto"
    """auto: online when an API key is there, else offline; or online, offline, disabled."""
    project: str = "dp-lora"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
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
    """The three folders that a job writes or reads."""

    outputs: str = "outputs"
    cache: str = "~/.cache/dp_lora"
    data: str = "~/.cache/dp_lora/data"


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
    _check_choices(config)
    _check_privacy(config.privacy)
    _check_train(config.train, config.privacy)
    _check_counts(config)
    levels = (len(config.model.unet.block_out_channels), len(config.model.unet.attention))
    if levels[0] != levels[1]:
        raise UserError(f"model.unet.attention: {levels[1]} values, expected one a level, {levels[0]}")
    for name in ("data", "public_data"):
        data: DataConfig = getattr(config, name)
        if data.channels not in (1, 3):
            raise UserError(f"{name}.channels={data.channels}: expected 1 (grey) or 3 (RGB)")
    if not config.public_data.public:
        raise UserError(
            f"public_data.public=false ({config.public_data.name}): pre-training has no privacy and "
            "takes public images only"
        )
    if not re.fullmatch(r"[\w.-]+", config.experiment):
        raise UserError(f"experiment={config.experiment!r}: expected letters, digits, '_', '-' or '.'")


def _check_choices(config: Config) -> None:
    choices: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("stages", config.stages, STAGES),
        ("trainable.components", config.trainable.components, COMPONENTS),
        ("privacy.clipping", [config.privacy.clipping], CLIPPINGS),
        ("train.precision", [config.train.precision], PRECISIONS),
        ("train.schedule", [config.train.schedule], SCHEDULES),
        ("sampler.name", [config.sampler.name], SAMPLERS),
        ("evaluation.reference", [config.evaluation.reference], ("train", "validation", "test")),
        ("tracking.wandb", [config.tracking.wandb], WANDB_MODES),
        ("tracking.progress", [config.tracking.progress], ("auto", "bar", "lines", "off")),
        ("resources.device", [config.resources.device], DEVICES),
    ]
    for name, values, options in choices:
        if not values:
            raise UserError(f"{name}=[]: expected at least one of {', '.join(options)}")
        for value in values:
            if value not in options:
                hint = did_you_mean(value, options)
                raise UserError(f"{name}={value!r}: expected one of {', '.join(options)}{hint}")


def _check_privacy(privacy: PrivacyConfig) -> None:
    epsilon, sigma = privacy.epsilon, privacy.noise_multiplier
    if epsilon is not None and not epsilon > 0:
        raise UserError(f"privacy.epsilon={epsilon}: expected a number above 0, inf or null")
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
    if not 0 < train.learning_rate < math.inf:
        raise UserError(f"train.learning_rate={train.learning_rate}: expected a finite number above 0")
    for name in ("weight_decay", "checkpoint_minutes", "warmup_steps", "embedder_learning_rate_factor"):
        if not 0 <= getattr(train, name) < math.inf:
            raise UserError(f"train.{name}={getattr(train, name)}: expected at least 0")
    if not 0 <= train.ema_decay < 1:
        raise UserError(f"train.ema_decay={train.ema_decay}: expected a number in [0, 1)")


def _check_counts(config: Config) -> None:
    at_least_one = {
        "train.max_steps": config.train.max_steps,
        "train.expected_batch_size": config.train.expected_batch_size,
        "lora.rank": config.lora.rank,
        "sampler.steps": config.sampler.steps,
        "sampler.num_samples": config.sampler.num_samples,
        "sampler.batch_size": config.sampler.batch_size,
        "evaluation.classifier_epochs": config.evaluation.classifier_epochs,
        "evaluation.batch_size": config.evaluation.batch_size,
        "tracking.log_every": config.tracking.log_every,
        "resources.threads": config.resources.threads,
        "resources.nodes": config.resources.nodes,
        "resources.processes": config.resources.processes,
        "resources.cpus": config.resources.cpus,
        "resources.time_limit_min": config.resources.time_limit_min,
        "model.pretrain.autoencoder_steps": config.model.pretrain.autoencoder_steps,
        "model.pretrain.unet_steps": config.model.pretrain.unet_steps,
        "data.image_size": config.data.image_size,
        "data.train_size": config.data.train_size,
        "public_data.train_size": config.public_data.train_size,
    }
    for name, value in at_least_one.items():
        if value is not None and not value >= 1:
            raise UserError(f"{name}={value}: expected at least 1")
    if config.resources.gpus < 0:
        raise UserError(f"resources.gpus={config.resources.gpus}: expected at least 0")
    if not 0 < config.resources.memory_gb < math.inf:
        raise UserError(f"resources.memory_gb={config.resources.memory_gb}: expected a number above 0")
    if config.lora.alpha is not None and not 0 < config.lora.alpha < math.inf:
        raise UserError(f"lora.alpha={config.lora.alpha}: expected a finite number above 0, or null")
    if not config.lora.target_modules and "lora" in config.trainable.components:
        raise UserError("lora.target_modules=[]: expected at least one end of a module's name")
    if config.seed < 0:
        raise UserError(f"seed={config.seed}: expected at least 0")
    if not 0 <= config.sampler.guidance < math.inf:
        raise UserError(f"sampler.guidance={config.sampler.guidance}: expected a finite number, at least 0")
    if not 0 <= config.sampler.eta <= 1:
        raise UserError(f"sampler.eta={config.sampler.eta}: expected a number in [0, 1]")
    for name, data in (("data", config.data), ("public_data", config.public_data)):
        for part in ("validation_size", "test_size"):
            if getattr(data, part) < 0:
                raise UserError(f"{name}.{part}={getattr(data, part)}: expected at least 0")


_CANNOT_CHANGE_THE_RESULT = ("experiment", "stages", "tracking", "resources", "paths")
_NOR_CAN = ("microbatch", "checkpoint_minutes")
"""Of `train`."""


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of what can change the result of a run.

    Device, threads, tracking, launcher and paths are not part of it, so the same run asked for twice
    has the same directory wherever it runs.
    """
    values = dataclasses.asdict(config)
    for name in _CANNOT_CHANGE_THE_RESULT:
        del values[name]
    for name in _NOR_CAN:
        del values["train"][name]
    return _digest(values)


def pretrained_fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of what can change the weights of a public pre-training."""
    model = dataclasses.asdict(config.model)
    del model["pretrained"]
    public = dataclasses.asdict(config.public_data)
    return _digest({"model": model, "public_data": public, "seed": config.seed})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def run_directory(config: Config, overrides: Sequence[str]) -> Path:
    """`<paths.outputs>/<experiment>/<readable overrides>-<fingerprint8>`.

    Args:
        config: the job.
        overrides: the command line's `key=value` words; those that cannot change the result are left out.
            A directory of the same run that was asked for in other words is taken again.
    """
    folder = Path(config.paths.outputs).expanduser() / config.experiment
    identity = fingerprint(config)
    said_otherwise = sorted(folder.glob(f"*-{identity}"))
    if said_otherwise:
        return said_otherwise[0]
    without_effect = (*_CANNOT_CHANGE_THE_RESULT, "cluster", *(f"train.{name}" for name in _NOR_CAN))
    words = [word.replace("'", "") for word in overrides]
    said = [word.lstrip("+~") for word in words if not word.lstrip("+~").startswith(without_effect)]
    readable = re.sub(r"[^\w.=,+-]+", "_", ",".join(sorted(said))).strip("_")[:120] or "defaults"
    return folder / f"{readable}-{identity}"


def config_directory() -> Path:
    """The folder of the YAML files: `conf/` of the checkout, else the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").exists() else package / "conf"
