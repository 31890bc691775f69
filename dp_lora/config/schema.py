"""The typed configuration of one job: every type, default and unit.

YAML files under `conf/` choose values; `checks` says which are possible.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from dp_lora.config.search import SearchConfig
from dp_lora.config.trainable import TrainableConfig

PROMPT = "a photo of a {}"
STAGES = ("pretrain", "finetune", "sample", "evaluate")
CLIPPINGS = ("flat", "automatic", "per_layer")
UNITS = ("image", "person")
PERSONS_KNOWN = ("letters_by_writer",)
"""Sets that know whose each image is."""
ADJACENCIES = {
    "zero_out": "zero out one {unit}, the number of {unit}s is public, Poisson sampling",
    "add_or_remove": "add or remove one {unit}, Poisson sampling",
}
"""The relations of neighbours, in words for one of `UNITS`; both have the same epsilon."""
PRECISIONS = ("float32", "bfloat16")
QUANTISED = ("int8", "nf4")
"""Of frozen weights alone."""
SAMPLERS = ("ddim", "dpmsolver++", "pipeline")
EXPORTS = ("npz", "png")
DISTRIBUTIONS = ("uniform", "logit_normal")
SCHEDULES = ("constant", "linear", "cosine")
DEVICES = ("auto", "cpu", "cuda")
RESAMPLINGS = ("pad", "box", "bilinear", "bicubic", "lanczos")
BACKGROUNDS = ("white", "grey", "black")
LAYOUTS = ("folders", "tables")
LABEL_COLUMNS = ("label", "labels")
"""Of the classes in tables, where `data.label_column` says none."""
WANDB_MODES = ("auto", "online", "offline", "disabled")
AUTOENCODERS = ("kl", "vq")
CONDITIONINGS = ("class", "none")
TARGET_GROUPS = ("qkv", "proj", "self", "cross", "conv")
EXTRACTORS = ("lite0", "inception", "dinov2")
DEEP_CLASSIFIERS = ("wrn", "resnet", "resnext")
CLASSIFIERS = ("cnn", *DEEP_CLASSIFIERS)
LARGEST_RATE = 1e9
"""AdamW moves a weight by about its learning rate in a step; far beyond this it overflows in float32."""
SMALLEST_EPSILON, LARGEST_EPSILON = 1e-9, 1e5
"""Where the accountants' numbers end: beyond them no noise multiplier is found, or one of almost nothing."""
LONGEST_TAG, LONGEST_NAME, LONGEST_PROJECT, NOT_IN_PROJECT = 64, 128, 128, "/\\#?%:"
"""The limits of W&B on tags, and on the names of runs and projects."""
FEWEST_RESAMPLES = 40
"""Below that, an interval of 95 % would lie beyond the smallest and the largest resample."""


@dataclass
class DataConfig:
    """One image set. The same schema serves the private set (`data`) and the public one (`public_data`)."""

    name: str = MISSING
    """Which loader: mnist5k, digits, mnist, fashion_mnist, letters, letters_by_writer, pictures,
    letters_pictures, imagefolder, cifar10, celeba, celebahq, emnist_letters or imagenet."""
    public: bool = False
    """Whether anybody may see it: only then may losses on it be logged."""
    source: str | None = None
    """Folder, zip archive, parquet file or hub name, for loaders that read one; null takes what lies in
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
    """The colour behind images with transparency: white, grey, black, or a colour such as '#f0f0f0'."""
    layout: str | None = None
    """How a folder with both tables and images is read: folders (a folder a class, whatever files lie beside
    them, metadata.csv too) or tables (of parquet); null refuses what can be read in two ways."""
    attribute: str | None = None
    """CelebA and CelebA-HQ: the attribute that says the class, such as Male; null gives one class."""
    image_column: str | None = None
    """Tables: the column of the images; null takes `image` or `img`, or `file_name` of metadata.csv."""
    label_column: str | None = None
    """Tables: the column of the classes; null takes `attribute`, `label` or `labels`; none: one class."""
    caption_column: str | None = None
    """Tables: the column of the texts that a text-to-image model is trained with; class folders: txt or
    caption, the ending of the files with each image's text. A text is as private as its image; null takes
    `model.prompt` with the name of the class. Images are drawn by `model.prompt`."""
    person_column: str | None = None
    """With privacy.unit=person, tables: the column that says whose an image is."""
    person_pattern: str | None = None
    """The same for files: a regular expression, found in each image's path in the set, whose first group is
    the person, such as '(P[0-9]+)_'."""
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
    """Weight of the divergence from N(0, I) for each value of an image; only for kl autoencoders."""
    codebook_weight: float = 1.0
    """Weight of the distance to the nearest code; only for vq autoencoders."""
    perceptual_weight: float = 0.0
    """Weight of the distance between features; 0 leaves it out."""
    perceptual_network: str = "lite0"
    """Whose features: lite0, or a file with torchvision's weights of vgg16."""
    adversarial_weight: float = 0.0
    """Weight of a patch discriminator, times the weight that makes both gradients equally long; 0: none."""
    adversarial_start: int = 0
    """Number of the step from which the discriminator takes part."""
    decoder_steps: int = 0
    """Steps of the decoder alone at the end, which make plain backgrounds exactly plain."""
    unet_steps: int = 4000
    unet_batch_size: int = 256
    unet_learning_rate: float = 1e-3
    ema_decay: float = 0.999
    """Decay of the moving average of the diffusion model's weights; the average is kept."""
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
    """The prompt of a text-to-image model for an image, with {} for the name of its class."""
    adapter: str | None = None
    """Run directory, or folder of an adapter, of other images, from whose values the training starts."""
    prompt_length: int | None = None
    """Tokens to which every prompt is padded or cut; null: as many as the pipeline. CLIP has its own 77."""
    base_precision: str = "float32"
    """Of the frozen weights of a text-to-image pipeline: bfloat16 halves their memory. The network computes
    in it too on a device that has it; adapters, clip and noise stay float32. int8 and nf4 keep the weights of
    the network's linear layers in 8 or 4 bits (bitsandbytes), and all others in bfloat16."""
    conditioning: str = "class"
    """class: one learnt token a class; none: the model is unconditional."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)


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
    unit: str = "image"
    """Whom the guarantee protects: image, or person with all of their images, captions and labels. The
    examples of a batch are then persons, and each draw picks one of the person's images."""
    adjacency: str = "zero_out"
    """Which sets are neighbours; both have the same epsilon. zero_out: one image contributes nothing, and the
    number of images is public. add_or_remove: one image more or less; the number of images is private, so
    `train.sample_rate` has to be given and nothing that is released depends on the number."""
    fixed_beforehand: bool = False
    """With `train.continue_from`: the plans of all trainings were fixed before the first one began, so that
    they compose as such. false counts by a Renyi filter, which holds for plans that were made on the way."""
    insecure_seed: int | None = None
    """Derives all private randomness from a number, for tests; no privacy against whoever knows it."""
    budget_epsilon: float | None = None
    """The epsilon, at `delta`, that all runs on the private set may spend together; a run that would exceed
    it is refused."""


@dataclass
class TrainConfig:
    """The private fine-tuning, apart from its privacy."""

    continue_from: str | None = None
    """Run directory of a finished run on the same images, from whose adapter the training starts. The
    statement then counts what both spent (docs/continuing.md)."""
    expected_batch_size: int = 1000
    """The number that divides a step's noised sum. Under privacy.adjacency=zero_out it is q N, the mean size
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
    timesteps: str | None = None
    """Their distribution: uniform or logit_normal; null: that of diffusers' training script for the model."""
    timestep_shift: float | None = None
    """Moves timesteps towards more noise: u -> s u / (1 + (s - 1) u); null: as the model's scheduler does."""
    snr_gamma: float | None = None
    """Weighs a timestep's loss by min(snr, gamma) / snr (Hang et al. 2023); null: by 1. Not for flows."""
    noise_offset: float = 0.0
    """Standard deviation of what is added to the diffusion noise of a whole channel; 0: nothing."""
    precision: str = "float32"
    microbatch: int | str = "auto"
    """Examples per forward and backward, or 'auto': the largest that fits and is worth it."""
    channels_last: bool = False
    """Keeps the UNet's images with their channels innermost, which tensor cores like and CPUs do not."""
    compile: bool = False
    """Compiles the UNet's frozen parts: a minute or two at the start of every job."""
    gradient_checkpointing: bool = False
    """Keeps only what enters each block of the network, and runs the block again in the backward: less
    memory, about a third more time."""
    checkpoint_minutes: float = 0.5
    """Time between checkpoints."""


@dataclass
class SamplerConfig:
    """How images are drawn from the fine-tuned model."""

    name: str = "dpmsolver++"
    """ddim, dpmsolver++, or pipeline: the scheduler and the call of a text-to-image pipeline's own."""
    steps: int = 15
    eta: float = 0.0
    """DDIM only: 0 is deterministic, 1 is the paper's choice."""
    guidance: float = 1.0
    """How far an image is pushed from the mean class towards its own; 1 is the paper's choice: not at all."""
    num_samples: int = 4000
    classes: Any = None
    """The number of images of each class, such as {cat: 500, dog: 20}, in place of `num_samples`; null: as
    many of each. It is public: choose it without counting private images."""
    export: str = "npz"
    """npz, or png: also `images/`, a folder a class with `metadata.jsonl`, for other tools."""
    batch_size: int = 250

    @property
    def number(self) -> int:
        """How many images are drawn."""
        return self.num_samples if self.counts is None else sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int] | None:
        """`classes` with names as texts, which YAML reads as numbers where they look like some."""
        return None if self.classes is None else {str(name): number for name, number in self.classes.items()}


@dataclass
class EvaluationConfig:
    """The metrics that are computed on the generated images."""

    extractors: list[str] = field(default_factory=lambda: ["lite0"])
    """Whose features the images are compared by: lite0, inception (FID and Inception score), dinov2."""
    inception_weights: str | None = None
    """File pt_inception-2015-12-05-6726825d.pth; null takes the one in torch's hub folder, or fetches it."""
    dinov2: str = "facebook/dinov2-large"
    """A DINOv2 model by its name on the hub, or a folder."""
    reference: str = "test"
    """Which real images the distances compare with: train, validation or test."""
    classifiers: list[str] = field(default_factory=lambda: ["cnn"])
    """The classifiers that are trained on generated images and tested on real ones: cnn; wrn, resnet and
    resnext take a GPU."""
    classifier_epochs: int = 10
    """Passes of the CNN over the generated images."""
    deep_classifier_epochs: int = 50
    """Passes of wrn, resnet and resnext."""
    bootstrap: int = 0
    """Resamples behind the intervals of the metrics; 0: no intervals."""
    fid_infinity: bool = False
    """Also the Frechet distances extrapolated to infinitely many images."""
    release: str = "none"
    """none: metrics carry no noise and are not covered by epsilon; dp: only the accuracies of the
    classifiers, covered by a budget of their own, `release_epsilon` at `release_delta`."""
    release_epsilon: float = 1.0
    release_delta: float | None = None
    """null: privacy.delta."""
    batch_size: int = 250


@dataclass
class TrackingConfig:
    """metrics.jsonl and privacy.json are always written; W&B mirrors them."""

    wandb: str = "auto"
    """auto: online when an API key is there, else offline; or online, offline, disabled."""
    entity: str | None = None
    """User or team; null takes WANDB_ENTITY, W&B's settings, or what belongs to the API key."""
    project: str | None = None
    """null takes WANDB_PROJECT, W&B's settings, or dp-lora."""
    group: str | None = None
    """null takes WANDB_RUN_GROUP or `experiment`; a sweep sets it."""
    name: str | None = None
    """Of the run; null takes WANDB_NAME, or the words that may be shown with the run's fingerprint."""
    folder: str | None = None
    """Where W&B makes its folder `wandb/`; null takes WANDB_DIR, or the run directory."""
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
    """The resources that one job may use and asks a cluster for; none of them changes the result."""

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
    """The partition of SLURM; null takes the cluster's default, as for the next three fields."""
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
    """The seed of public randomness: initialisation, sampling, evaluation. Never of private randomness."""
    optimize: Any = None
    """The metric that the job returns to a sweeper, such as `accuracy_cnn`, or a list of them: for those that
    choose the next job by the results of earlier ones, such as hydra/sweeper=optuna (docs/sweeps.md)."""
    data: DataConfig = field(default_factory=DataConfig)
    public_data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
