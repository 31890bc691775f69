"""What is likely to be typed wrong: one line says what to write, before anything is done."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from dp_lora.__main__ import main
from dp_lora.commands.command_line import check_words, prepared, quoted
from dp_lora.errors import UserError
from tests.builders.tiny import composed

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Refused:
    """Gives the one line with which the command refuses its words; nothing may come to be anywhere."""
    for name in ("CACHE", "DATA", "LEDGER"):
        monkeypatch.setenv(f"DP_LORA_{name}", str(tmp_path / name.lower()))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*words: str) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["dp-lora", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        GlobalHydra.instance().clear()
        said, errors = capfd.readouterr()
        assert (stop.value.code, said, errors.count("\n")) == (2, "", 1), (stop.value.code, said, errors)
        assert [path.name for path in tmp_path.rglob("*")] == ["here"], "nothing was written"
        assert errors.startswith("dp-lora: ") and errors.endswith("\n")
        return str(errors[len("dp-lora: ") : -1])

    return call


EPSILONS = "one of eps1, eps3, eps5, eps10, inf, none"
RANKS = "one of r1, r2, r4, r8, r16, r32, r64"
COLOUR = "expected white, grey, black or a colour such as 'data.background=\"#f0f0f0\"'"
SWEEPS = (
    "one of baselines, batch, clip_norm, components, epsilon, headline, noise_multiplicity, "
    "noise_multiplier, none, private_search, rank, salience"
)
DRAWS = "one of k1, k2, k4, k8, k12, k16, k32"
SETS = (
    "one of celeba32, celeba64, celebahq256, cifar10, digits, emnist_letters, fashion_mnist, imagefolder, "
    "imagenet32, imagenet64, letters, letters_by_writer, letters_heldout, letters_pictures, mnist, mnist5k, "
    "pictures"
)
MODELS = "one of celeba32, celeba64, cifar10, cin256, ldm4, ldm32, ldm32_rgb, lsun_churches256, mnist, tiny8"
OUTPUTS = "a run makes its own directory below paths.outputs; expected paths.outputs="
THERE = "is there already; expected"
ONE_JOB = "it prints the configuration of one job and runs none; expected one of the two flags"

NUMBERS_FOR_PRESETS = {
    ("epsilon=3",): f"epsilon=3: expected privacy.epsilon=3, or {EPSILONS}; did you mean epsilon=eps3?",
    ("epsilon=0.5",): f"epsilon=0.5: expected privacy.epsilon=0.5, or {EPSILONS}",
    ("lora_rank=8",): f"lora_rank=8: expected lora.rank=8, or {RANKS}; did you mean lora_rank=r8?",
    ("lora_rank=12",): f"lora_rank=12: expected lora.rank=12, or {RANKS}",
    ("noise_multiplicity=4",): (
        f"noise_multiplicity=4: expected privacy.noise_multiplicity=4, or {DRAWS}; did you mean "
        "noise_multiplicity=k4?"
    ),
    ("noise_multiplier=1.1",): (
        "noise_multiplier=1.1: expected privacy.noise_multiplier=1.1, or one of calibrated, fixed"
    ),
    ("-m", "epsilon=1,10"): (
        f"epsilon=1,10: expected -m privacy.epsilon=1,10, or {EPSILONS}; did you mean -m epsilon=eps1,eps10?"
    ),
    ("-m", "epsilon=range(1,3)"): (
        f"epsilon=range(1,3): expected -m privacy.epsilon=range(1,3), or {EPSILONS}"
    ),
    ("-m", "epsilon=eps1,3"): f"epsilon=3: expected {EPSILONS}",
    ("epsilon=null",): f"epsilon=null: expected {EPSILONS}; did you mean 'none'?",
    ("epsilon=",): f"epsilon=: expected {EPSILONS}",
    ("epsilon=true",): f"epsilon=true: expected privacy.epsilon=true, or {EPSILONS}",
    ("epsilon={a:1}",): f"epsilon={{a:1}}: expected {EPSILONS}",
    ("scale=3",): "scale=3: expected one of full, smoke",
}

PRESETS = {
    ("lora_rank=[r4,r8]",): (
        "lora_rank=[r4,r8]: a job takes one preset of a group; expected -m lora_rank=r4,r8 for a job each"
    ),
    ("-m", "epsilon=[eps1,eps3]"): (
        "epsilon=[eps1,eps3]: a job takes one preset of a group; expected -m epsilon=eps1,eps3 for a job each"
    ),
    ("-m", "epsilon=eps1,eps11"): f"epsilon=eps11: expected {EPSILONS}; did you mean 'eps1'?",
    ("lora_rank=R4",): f"lora_rank=R4: expected {RANKS}; did you mean 'r4'?",
    ("lora_rank=r5",): f"lora_rank=r5: expected {RANKS}",
    ("data=/images",): (
        f"data=/images: expected {SETS}, or for a folder data=imagefolder data.source=/images"
    ),
    ("model=~/models/mine",): (
        f"model=~/models/mine: expected {MODELS}, or for a folder 'model.pretrained=~/models/mine'"
    ),
    ("data=a(b)",): f"data=a(b): expected {SETS}",
    ("data@public_data=leters",): f"data@public_data=leters: expected {SETS}; did you mean 'letters'?",
    ("data@public=letters",): "data@public=letters: no such place for a preset; expected data=letters",
    ("hydra/launcher=slrum", "-m"): (
        "hydra/launcher=slrum: expected one of basic, local, slurm; did you mean 'slurm'?"
    ),
    ("hydra.launcher.max_parallel=2", "-m"): (
        "hydra.launcher.max_parallel=2: expected hydra/launcher=local or hydra/launcher=slurm with it"
    ),
}

FOLDERS = {
    ("hydra.run.dir=mine",): f"hydra.run.dir=mine: {OUTPUTS}mine",
    ("-m", "hydra.sweep.dir=a b"): (
        "hydra.sweep.dir=a b: a run makes its own directory below paths.outputs; expected 'paths.outputs=a b'"
    ),
    ("-m", "hydra.sweep.subdir=mine"): f"hydra.sweep.subdir=mine: {OUTPUTS}<folder>",
    ("hydra.output_subdir=mine",): f"hydra.output_subdir=mine: {OUTPUTS}<folder>",
    ("hydra.job.chdir=true",): f"hydra.job.chdir=true: {OUTPUTS}<folder>",
    ("+hydra.run.dir=mine",): f"+hydra.run.dir=mine: {OUTPUTS}mine",
}

SIGNS = {
    ("+experiment=mnist",): f"+experiment=mnist: experiment {THERE} experiment=mnist",
    ("++experiment=mnist",): f"++experiment=mnist: experiment {THERE} experiment=mnist",
    ("+lora.rank=4",): f"+lora.rank=4: lora.rank {THERE} lora.rank=4",
    ("~lora.rank",): "~lora.rank: no option can be left out; expected lora.rank=<value>",
    ("~lora_rank=r8",): "~lora_rank=r8: no option can be left out; expected lora_rank=r8",
    ("~lora",): "~lora: no option can be left out; expected values of its fields",
    ("--lora.rank=4",): "--lora.rank=4: options have no hyphens; expected lora.rank=4",
    ("-lora.rank=4",): "-lora.rank=4: options have no hyphens; expected lora.rank=4",
    ("--lora.rank", "4"): "--lora.rank: options have no hyphens; expected lora.rank=4",
    ("--epsilon", "eps1"): "--epsilon: options have no hyphens; expected epsilon=eps1",
    ("-paths.outputs=here",): "-paths.outputs=here: options have no hyphens; expected paths.outputs=here",
    ("-cluster=mine",): "-cluster=mine: options have no hyphens; expected cluster=mine",
    ("--lora.rnk=4",): "--lora.rnk: no such flag; did you mean 'lora.rank'?; --help lists them",
    ("--multirn",): "--multirn: no such flag; did you mean '--multirun'?; --help lists them",
    ("lora.rank", "4"): "lora.rank: expected lora.rank=4",
    ("lora.rank:", "4"): "lora.rank:: expected lora.rank=4",
    ("lora.rank:4",): "lora.rank:4: expected lora.rank=4",
    ("lora.rank =4",): "lora.rank =4: 'lora.rank ' is no option; did you mean 'lora.rank'?",
    ("lora..rank=4",): "lora..rank=4: 'lora..rank' is no option; did you mean 'lora.rank'?",
    ("=4",): "=4: '' is no option",
    ("lora.rank==4",): "lora.rank==4: expected a whole number",
    ("—dry-run",): "—dry-run: begins with a dash; expected --dry-run",
    ("\N{MINUS SIGN}m",): "\N{MINUS SIGN}m: begins with a dash; expected -m",
    ("ouputs",): "'ouputs': expected option=value; did you mean 'paths.outputs'?",
    ("model.prompt=a", "photo", "of", "a", "{}", "seed=1"): (
        "'photo': expected option=value; a value with spaces takes quotes: 'model.prompt=\"a photo of a {}\"'"
    ),
    ("data.source=/\udcff",): (
        "'data.source=/\\udcff': no UTF-8; expected a name in UTF-8: rename the file, or link to it"
    ),
}

FLAGS = {
    ("--cfg", "job", "-m"): f"--cfg with -m: {ONE_JOB}",
    ("--cfg", "job", "-m", "lora_rank=r4,r8"): f"--cfg with -m: {ONE_JOB}",
    ("--cfg", "job", "--dry-run"): f"--cfg with --dry-run: {ONE_JOB}",
    ("--info", "-m"): f"--info with -m: {ONE_JOB}",
    ("--cfg",): "argument --cfg/-c: expected one argument; --help lists the flags",
    ("--cfg", "jbo"): (
        "argument --cfg/-c: invalid choice: 'jbo' (choose from 'job', 'hydra', 'all'); --help lists the flags"
    ),
    ("--experimental-rerun",): (
        "argument --experimental-rerun: expected one argument; --help lists the flags"
    ),
    ("--experimental-rerun=run.pickle",): (
        "--experimental-rerun=run.pickle: not for these jobs; expected the run's own command, which "
        "continues it; its config.yaml says what it was"
    ),
    ("--config-name", "mine"): (
        "--config-name=mine: not for these jobs; expected --config-dir=FOLDER with presets of your own"
    ),
    ("--config-dir=/nowhere",): "--config-dir=/nowhere: expected a folder of presets",
    ("--resolve",): "--resolve: expected --cfg job with it",
    ("--run", "-m"): "--run with --multirun: expected one of the two flags",
}

CHARACTERS = {
    ("model.prompt=a photo of a {}",): (
        "model.prompt=a photo of a {}: '{' takes quotes; expected 'model.prompt=\"a photo of a {}\"'"
    ),
    ("data.source=/a=b",): "data.source=/a=b: '=' takes quotes; expected 'data.source=\"/a=b\"'",
    ("data.source=/a(b)",): "data.source=/a(b): '(' takes quotes; expected 'data.source=\"/a(b)\"'",
    ("data.source=/bücher",): "data.source=/bücher: 'ü' takes quotes; expected 'data.source=\"/bücher\"'",
    ("data.source=/a'b",): ("data.source=/a'b: \"'\" takes quotes; expected 'data.source=\"/a'\"'\"'b\"'"),
    ("tracking.tags=[a b,中]",): (
        "tracking.tags=[a b,中]: '中' takes quotes; expected 'tracking.tags=[\"a b\",\"中\"]'"
    ),
    ("tracking.tags=#1",): "tracking.tags=#1: '#' takes quotes; expected 'tracking.tags=[\"#1\"]'",
    ("data.source=/a\nb(",): ("data.source=/a\\nb(: '\\n' takes quotes; expected 'data.source=\"/a\\nb(\"'"),
    ("data.source=2024_01",): (
        "data.source=2024_01: would be read as 202401; expected quotes: 'data.source=\"2024_01\"'"
    ),
    ("model.prompt=[{}]",): (
        "model.prompt=[{}]: would be read as a list or mapping; expected quotes: 'model.prompt=\"[{}]\"'"
    ),
    ("tracking.group=1e3",): (
        "tracking.group=1e3: would be read as 1000.0; expected quotes: 'tracking.group=\"1e3\"'"
    ),
    ("tracking.project=true",): (
        "tracking.project=true: would be read as True; expected quotes: 'tracking.project=\"true\"'"
    ),
    ("train.learning_rate=(1)",): "train.learning_rate=(1): expected a number",
    ("dta.source=/a(b)",): "dta.source: no such option; did you mean 'data.source'?",
}

COMPOSED = {
    ("stages=finetune",): "stages=finetune: expected a list: stages=[finetune]",
    ("lora_rank=r4,r8",): "lora_rank=r4,r8: several values; expected -m lora_rank=r4,r8 for a job each",
    ("data.source=a,b",): (
        "data.source=a,b: several values; expected -m data.source=a,b for a job each, or for one text "
        "'data.source=\"a,b\"'"
    ),
    ("data.classes=0,1",): (
        "data.classes=0,1: several values; expected -m data.classes=0,1 for a job each, or for one list "
        "data.classes=[0,1]"
    ),
    ("lora.rank=range(1,4)",): "lora.rank=range(1,4): several values; expected -m with it, for a job each",
    ("data.source=${HOME}",): (
        "data.source=${HOME}: no option has this name; expected ${oc.env:HOME} for a variable of the shell"
    ),
    ("LORA.Rank=4",): "LORA.Rank: no such option; did you mean 'lora.rank'?",
    ("data.source=",): 'data.source="": expected a text that is not empty, or null',
    ("paths.outputs=",): 'paths.outputs="": expected a text that is not empty',
    ("privacy.delta=1/60000",): "privacy.delta=1/60000: expected a number",
    ("train.learning_rate=1e38",): "train.learning_rate=1e+38: expected a number above 0, at most 1e+09",
    ("train.learning_rate=1e6", "trainable.learning_rate_factor=1e6"): (
        "trainable.learning_rate_factor=1000000.0: with train.learning_rate=1000000.0 expected a product of "
        "at most 1e+09"
    ),
}  # fmt: skip

BOUNDS = {
    ("privacy.epsilon=1e300",): (
        "privacy.epsilon=1e+300: expected a number from 1e-09 to 100000, inf (no noise) or null"
    ),
    ("privacy.epsilon=1e-300",): (
        "privacy.epsilon=1e-300: expected a number from 1e-09 to 100000, inf (no noise) or null"
    ),
    ("evaluation.release=dp", "evaluation.release_epsilon=1e300"): (
        "evaluation.release_epsilon=1e+300: expected a number from 1e-09 to 100000"
    ),
    ("-m", "hydra.sweeper.params.lora_rank=r2"): (
        "hydra.sweeper.params.lora_rank=r2: belongs to the presets of `sweep`; expected -m lora_rank=r2"
    ),
    ("-m", "+hydra.sweeper.params={a:1}"): (
        "+hydra.sweeper.params={a:1}: belongs to the presets of `sweep`; expected -m <option>=<value>,<value>"
    ),
}

NULL = {
    ("seed=null",): "seed=null: expected a whole number",
    ("model.prompt=null",): "model.prompt=null: expected a text",
    ("paths.outputs=null",): "paths.outputs=null: expected a text",
    ("lora=null",): "lora=null: expected values of its fields",
    ("data.train_size=50%",): "data.train_size=50%: expected data.train_size=0.5",
    ("data.train_size=half",): "data.train_size=half: expected a whole number, or a fraction",
    ("data.source=${oc.env:NOPE}",): (
        "data.source: the shell has no variable NOPE; expected `export NOPE=<value>` before"
    ),
    ("data.value_range=12bit",): (
        "data.value_range=12bit: expected a list of numbers, such as data.value_range=[0,4095]"
    ),
    ("train.learning_rate=0,01",): (
        "train.learning_rate=0,01: several values; expected -m train.learning_rate=0,01 for a job each, or "
        "train.learning_rate=0.01"
    ),
}

TRACKING = {
    ("tracking.wandb=false",): "tracking.wandb=false: expected tracking.wandb=disabled",
    ("tracking.wandb=off",): "tracking.wandb=off: expected tracking.wandb=disabled",
    ("tracking.wandb=true",): "tracking.wandb=true: expected tracking.wandb=online",
    ("tracking.wandb=dryrun",): "tracking.wandb=dryrun: expected tracking.wandb=offline",
}

NO_HYPHENS = "options have no hyphens; expected"
OTHERS = {
    ("--learning_rate=0.01",): f"--learning_rate=0.01: {NO_HYPHENS} train.learning_rate=0.01",
    ("--learning-rate", "0.01"): f"--learning-rate: {NO_HYPHENS} train.learning_rate=0.01",
    ("learning_rate=0.01",): "learning_rate: no such option; expected train.learning_rate=0.01",
    ("lr=0.01",): "lr: no such option; expected train.learning_rate=0.01",
    ("--max_steps=5",): f"--max_steps=5: {NO_HYPHENS} train.max_steps=5",
    ("--network_dim=8",): f"--network_dim=8: {NO_HYPHENS} lora.rank=8",
    ("--rank", "8"): f"--rank: {NO_HYPHENS} lora.rank=8",
    ("--train_data_dir=/data",): (f"--train_data_dir=/data: {NO_HYPHENS} data=imagefolder data.source=/data"),
    ("--train_data_dir=/a(1)",): (
        f"--train_data_dir=/a(1): {NO_HYPHENS} data=imagefolder 'data.source=\"/a(1)\"'"
    ),
    ("--train_batch_size=4",): f"--train_batch_size=4: {NO_HYPHENS} train.expected_batch_size=4",
    ("--max_train_steps=100",): f"--max_train_steps=100: {NO_HYPHENS} train.max_steps=100",
    ("--mixed_precision=fp16",): f"--mixed_precision=fp16: {NO_HYPHENS} train.precision=bfloat16",
    ("--output_dir=/o",): f"--output_dir=/o: {NO_HYPHENS} paths.outputs=/o",
    ("--seed", "1"): f"--seed: {NO_HYPHENS} seed=1",
    ("--epsilon=3",): f"--epsilon=3: {NO_HYPHENS} privacy.epsilon=3",
    ("--use_8bit_adam",): "--use_8bit_adam: no such flag; --help lists them",
}

WORDS = {
    ("data.background=[255,255,255]",): (
        "data.background=[255,255,255]: expected white, grey, black or a colour such as "
        "'data.background=\"#f0f0f0\"'"
    ),
    ("lora_rank=", "r4"): "'r4': no space belongs there; expected lora_rank=r4",
    ("lora_rank", "=", "r4"): "lora_rank: expected lora_rank=r4",
    ("stages=[evaluate]", "config.yaml"): "'config.yaml': expected option=value",
    ("lora.rank=4", "export"): "'export': expected `dp-lora export` first",
    ("train",): "'train': expected stages=[finetune], or train=<preset>",
    ("train", "long"): "train: expected train=long",
    ("~",): "~: no such option",
    ("~nope",): "~nope: no such option",
    ("+data@extra=mnist",): "+data@extra=mnist: no such place for a preset; expected data=mnist",
}

TWICE = {
    ("sweep=rank", "sweep=epsilon"): (
        "sweep=rank and sweep=epsilon: one sweep a command; expected one of the two"
    ),
    **{
        (one, other): f"{one} and {other}: expected one of the two"
        for one, other in (
            ("seed=1", "seed=2"),
            ("data=digits", "data=mnist"),
            ("epsilon=eps1", "epsilon=eps3"),
            ("seed=1", "++seed=2"),
            ("data@public_data=digits", "data@public_data=letters"),
            ("lora.rank=4", "lora={alpha: 1, rank: 8}"),
            ("hydra.verbose=true", "hydra.verbose=false"),
            ("+resources.sbatch.hold=1", "~resources.sbatch.hold"),
        )
    },
    ("-m", "seed=0,1", "lora_rank=r4", "seed=2"): "seed=0,1 and seed=2: expected one of the two",
    ("--config-dir=a", "-cd", "b"): "-cd: --config-dir is given twice; expected it once",
    ("-m", "sweep=rank,epsilon"): f"sweep=rank,epsilon: one sweep a command; expected sweep=<{SWEEPS}>",
    ("-m", "sweep=glob(*)"): f"sweep=glob(*): one sweep a command; expected sweep=<{SWEEPS}>",
    ("-m", "cluster=example,none", "--dry-run"): (
        "cluster=example,none: one cluster a command; expected cluster=<one of example, example_container, "
        "example_preemptible, none>"
    ),
    ("-m", "hydra/launcher=local,basic"): (
        "hydra/launcher=local,basic: one launcher a command; expected hydra/launcher=<one of basic, local, "
        "slurm>"
    ),
    ("-m", "tracking.wandb=offline,disabled"): (
        "tracking.wandb=offline,disabled: both ask for the same run, since this cannot change its result; "
        "expected one value"
    ),
    ("-m", "stages=[finetune],[sample]", "--dry-run"): (
        "stages=[finetune],[sample]: both ask for the same run, since this cannot change its result; "
        "expected one value"
    ),
}

EMPTY = {
    ("-m", "lora_rank=glob(zz*)", "--dry-run"): (
        "lora_rank=glob(zz*): stands for no value at all; expected at least one"
    ),
    ("-m", "seed=range(0,0)"): "seed=range(0,0): stands for no value at all; expected at least one",
    ("seed=range(0,0)", "--dry-run"): "seed=range(0,0): stands for no value at all; expected at least one",
    ("sweep=baselines", "seed=range(0,0)"): (
        "seed=range(0,0): stands for no value at all; expected at least one"
    ),
    ("-m", "seed=interval(0,1)"): "seed=interval(0,1): expected values between commas, or a range",
    (
        "--shell-completion",
    ): "--shell-completion: expected install=bash or uninstall=bash with it (zsh, fish)",
    ("--package", "foo", "--cfg", "job"): (
        "--package=foo: no part of the configuration; expected one such as privacy"
    ),
}

ADVICE = {
    ("data.background=#fff",): f"data.background=#fff: {COLOUR}",
    ("data.background=(255,255,255)",): f"data.background=(255,255,255): {COLOUR}",
    ("data.value_range=(0,4095)",): (
        "data.value_range=(0,4095): expected a list of numbers: data.value_range=[0,4095]"
    ),
    **{(f"epsilon={number}",): f"epsilon={number}: expected {EPSILONS}"
       for number in ("0", "-1", "nan", "1e400")},
    ("lora.rank: 4",): "lora.rank: 4: expected lora.rank=4",
    ("lora.rank",): "lora.rank: expected lora.rank=<value>",
    ("train.lr=1",): "train.lr: no such option; expected train.learning_rate=1",
}  # fmt: skip

TABLE = {
    **TWICE, **EMPTY, **ADVICE,
    **NUMBERS_FOR_PRESETS, **PRESETS, **FOLDERS, **SIGNS, **FLAGS, **CHARACTERS, **COMPOSED, **BOUNDS,
    **NULL, **TRACKING, **OTHERS, **WORDS,
}  # fmt: skip


@pytest.mark.parametrize("words", TABLE, ids=lambda words: ascii(" ".join(words)))
def test_a_mistake_is_one_line_that_says_what_to_write(words: tuple[str, ...], refused: Refused) -> None:
    assert refused(*words) == TABLE[words]


VALUES = [
    "a photo of a {}", "a=b {}", "{} (1)", "[{}]", "/bücher/{}", "中 {}", "a & {}", "# {}", "it's {}",
    'a "{}"', "{}\\", '\\" {}', "$HOME {}", "a; rm {}", "a `b` {}", "a !b {}", "{}, {}", "null{}", " {} ",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_what_is_shown_can_be_pasted(value: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_words([f"model.prompt={value}"])
    (pasted,) = shlex.split(re.split("expected (?:quotes: )?", str(refusal.value))[1])
    assert pasted.startswith("model.prompt=")
    check_words([pasted])
    (override,) = OverridesParser.create().parse_overrides(prepared([pasted]))
    assert override.value() == value


def test_what_is_shown_composes() -> None:
    (pasted,) = shlex.split("""'model.prompt="a photo of a {}"'""")
    config = composed(*prepared([pasted, "data=imagefolder", "data.source=~/my images"]))
    assert (config.model.prompt, config.data.source) == ("a photo of a {}", "~/my images")


SHOWN = [
    "train.learning_rate=0.01", "train.max_steps=5", "lora.rank=8", "data=imagefolder data.source=/data",
    "data=imagefolder 'data.source=\"/a(1)\"'", "train.expected_batch_size=4", "train.max_steps=100",
    "train.precision=bfloat16", "paths.outputs=/o", "seed=1", "privacy.epsilon=3", "lora_rank=r4",
    "train=long",
    "'data.background=\"#f0f0f0\"'", "data.value_range=[0,4095]", "data.train_size=0.5", "stages=[finetune]",
    "tracking.wandb=disabled", "tracking.wandb=offline", "data=mnist",
]  # fmt: skip
"""What some lines of the table show."""


def test_every_word_that_is_shown_composes() -> None:
    lines = list(TABLE.values())
    for shown in SHOWN:
        assert any(f"expected {shown}" in line or f"such as {shown}" in line for line in lines), shown
    given = [word for shown in SHOWN for word in shlex.split(shown)]
    once = {word.partition("=")[0]: word for word in given}
    for word in given:
        check_words([word])
    composed(*prepared(list(once.values())))


def test_the_version_is_that_of_this_program(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["dp-lora", "--version"])
    main()
    assert re.fullmatch(r"dp-lora \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_real_shell_takes_what_is_shown() -> None:
    lines = [f"printf '%s\\0' {quoted(f'name={value}')}" for value in VALUES]
    done = subprocess.run(["sh", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    parser = OverridesParser.create()
    read = [parser.parse_overrides([word])[0].value() for word in done.stdout.split("\0")[:-1]]
    assert read == VALUES


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_can_be_quoted(text: str) -> None:
    (word,) = shlex.split(quoted(f"name={text}"))
    (override,) = OverridesParser.create().parse_overrides([word])
    assert override.value() == text


@pytest.mark.parametrize(
    "words",
    [
        ["epsilon=eps1,inf", "-m"], ["epsilon=inf"], ["data.source=~/images"], ["model.pretrained=~/a b"],
        ["++lora.rank=4"], ["+resources.sbatch.reservation=night"], ["~resources.sbatch.hold"],
        ["lora_rank=glob(*)", "-m"], ["--cfg", "job", "lora.rank=5"], ["--info", "defaults"], ["-c", "job"],
        ["-sc", "install=bash"], ["sweep=rank", "--dry-run"], ["data.source=007"], ["--multi", "seed=0,1"],
        ["data@public_data=digits"], ["hydra/launcher=local", "hydra.launcher.max_parallel=2", "-m"],
        ["seed=1", "seed=1"], ["lora={rank: 4}", "lora.alpha=1"], ["lora_rank=r4", "lora.rank=8"],
        ["lora_rank=r8.yaml"], ['data.source="a,b"'], ["tracking.tags=[a,b]"], ["seed=range(3)", "-m"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_can_be_meant_is_taken(words: list[str]) -> None:
    check_words(words)


def test_a_folder_of_presets_of_ones_own_is_known(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("")
    check_words(["cluster=mine", f"--config-dir={tmp_path}"])
    with pytest.raises(UserError, match="cluster=mine: expected one of example, example_container"):
        check_words(["cluster=mine"])
    check_words(["cluster=mine", f"hydra.searchpath=[file://{tmp_path}]"])
