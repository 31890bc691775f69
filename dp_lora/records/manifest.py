"""The list of all that may leave a run: files, fields, and what Weights & Biases gets, each with a reason.

Everything that is named here is covered by epsilon, is public, or is marked as what epsilon does not cover.
Everything else in a run directory is private: the directory has mode 0700, and a field that is not listed
stays behind, whoever adds it. `dp_lora.records.tracker` sends, and `dp-lora export` copies, what this module
lets through.

Where the number of training images N appears: `num_examples` in privacy.json, and N sample rates are the
expected batch size; the sizes of the splits among the settings; the numbers of reference images in
result.json. N is public under the relation `zero_out`. Under `add_or_remove` these fields are left out.

With privacy.unit=person N is the number of persons. How many images there are is private under either
relation: a job writes no number of reference images to result.json, and no time or memory that follows one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from dp_lora.config.identity import PRIVATE_SETTINGS, fingerprint, readable
from dp_lora.config.load import WEIGHTS
from dp_lora.config.schema import STAGES, Config
from dp_lora.errors import UserError
from dp_lora.records import field_kinds
from dp_lora.records.field_kinds import ANY, Shape, number
from dp_lora.records.rounding import coarse, power_of_two
from dp_lora.records.shapes import CHOICE, RELEASE, SEARCH

SIZES = ("data.train_size", "data.validation_size", "data.test_size")
"""Settings that tell how many private images there are."""


class Why(StrEnum):
    """Why something may leave."""

    NOISED = "a function of the noised sums of the training, which epsilon covers"
    GENERATED = "computed from the adapter, labels of a public prior and settings: epsilon covers it"
    SETTING = "chosen before the training, or follows from what was: no function of an image"
    SIZE = "tells the number of images or persons, public by zero_out; left out under add_or_remove"
    OWN_BUDGET = "read from a sum with noise of its own: the budget under `release` covers it"
    MACHINE = "says with what it was made: no function of an image"
    COARSE = "rounded to one digit, or to a power of two: no noise protects it, and rounding adds none"
    LABEL = "a word that its owner gave to be shown"
    AFTER = "a clock that starts when the private training has ended"
    UNCOVERED = "no epsilon covers it: left out, or marked where its owner asks for it"


ADAPTER_SUFFIXES = frozenset({".safetensors", ".json", ".md"})

FILES: Mapping[str, Why] = {
    "adapter": Why.NOISED,
    "samples.npz": Why.GENERATED,
    "samples.png": Why.GENERATED,
    "images": Why.GENERATED,
    "privacy.json": Why.SETTING,
    "metrics.jsonl": Why.NOISED,
    "result.json": Why.GENERATED,
    "config.yaml": Why.SETTING,
    "provenance.json": Why.MACHINE,
}
"""Files and folders of a run that may leave; of those that hold fields, the fields below."""

KEPT_FILES: Mapping[str, str] = {
    "checkpoint": "the noise key, the write-ahead record, scores and pictures of private images",
    "samples": "folders of images that were drawn afterwards; each may be given away as it is",
    "evaluations": "metrics that were computed afterwards, most of them on private images without a budget",
    "status.json": "times, and errors that may name private files",
    "wandb": "W&B's own logs name folders and machine; what it sends is below",
}
"""Files and folders of a run that stay, with what they hold."""

ADAPTER: frozenset[str] = frozenset(
    {
        "README.md",
        *("adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "prompts.json"),
        *("pytorch_lora_weights.safetensors", "kohya.safetensors"),
    }
)
SAMPLES = frozenset({"images", "labels", "classes"})

ROWS: Mapping[str, Why] = {
    "epsilon": Why.SETTING,
    "delta": Why.SETTING,
    "step": Why.SETTING,
    "learning_rate": Why.SETTING,
    "update_norm": Why.NOISED,
    "signal_to_noise": Why.NOISED,
    "private_loss": Why.NOISED,
}
"""The values that a stage that sees private data may log, in metrics.jsonl and the rows of W&B.

`update_norm` and `signal_to_noise` are of the noised update, `private_loss` is read from the noised sum. A
row holds no time: how long a step takes follows the size of its batch, which no noise protects. Lines of
progress show the same values, with times beside them: they go to stderr, which is the owner's, and are not
released.
"""

PRIVACY: Mapping[str, Why] = {
    **dict.fromkeys(
        (
            "accountant", "adjacency", "clipping", "complete", "covers", "delta", "does_not_cover", "epsilon",
            "earlier_trainings", "epsilon_by_accountant", "epsilon_of_this_training",
            "expected_batch_size", "loss_share", "max_grad_norm",
            "noise_multiplicity", "noise_multiplier", "planned_steps", "private", "release",
            "reproducible_noise", "sample_rate", "search", "steps", "target_epsilon", "unit",
            "unprotected_start",
        ),
        Why.SETTING,
    ),
    "choice": Why.NOISED,
    "num_examples": Why.SIZE,
}  # fmt: skip
"""Fields of privacy.json; `steps` counts the executions that were begun, by a schedule without images."""

_KINDS: Mapping[str, Shape] = {
    **dict.fromkeys(("complete", "private", "reproducible_noise", "unprotected_start"), field_kinds.flag),
    **dict.fromkeys(("accountant", "adjacency", "clipping", "unit"), field_kinds.words),
    **dict.fromkeys(("covers", "does_not_cover"), field_kinds.sentences),
    "epsilon_by_accountant": field_kinds.numbers,
    "earlier_trainings": field_kinds.list_of_numbers,
    "release": RELEASE,
    "choice": CHOICE,
    "search": SEARCH,
}
"""The shapes of the fields of privacy.json that are not numbers."""

GENERATED_METRICS = frozenset({"inception_score", "inception_score_before"})
"""Metrics of generated images alone: epsilon of the adapter covers them."""

RELEASED_METRICS = "dp_"
"""How the names of metrics begin that `evaluation.release=dp` reads from a noised sum."""

AUDIT = frozenset(
    {
        "epsilon", "delta", "epsilon_lower_bound", "epsilon_lower_bound_if_gaussian", "contradicted",
        "confidence", "kind", "canaries", "most_that_could_be_shown", "guesses", "correct",
        "scored_for_noise_multiplier", "noise_test", "true_positives", "positives", "false_positives",
        "negatives",
    }
)  # fmt: skip
"""The fields that an audit finds without a private image: canaries are trained without one."""

UNCOVERED_NOTE = "computed on private data; releasing it is not covered by epsilon"

RESULT: Mapping[str, Why] = {
    "metrics": Why.UNCOVERED,
    "intervals": Why.UNCOVERED,
    "reference": Why.UNCOVERED,
    "tested_on": Why.UNCOVERED,
    "real_baseline": Why.UNCOVERED,
    **dict.fromkeys(
        (
            "private_metrics", "private_metrics_note", "intervals_note", "n_samples", "n_before", "n_note",
            "classifiers", "extractors", "neighbours", "values", "seed", "trainable_parameters",
            "trainable_parameters_by_component",
        ),
        Why.SETTING,
    ),
    "choice": Why.NOISED,
    "images_compared": Why.MACHINE,
    "noise": Why.OWN_BUDGET,
    "release": Why.OWN_BUDGET,
    "audit": Why.NOISED,
    "seconds": Why.COARSE,
    "peak_memory_bytes": Why.COARSE,
    "device": Why.MACHINE,
}  # fmt: skip
"""Fields of result.json. `metrics` and `intervals` keep the metrics that are known to be covered by epsilon,
or by a budget of their own; `audit` keeps what is known to be measured without private images."""

_SPLIT: Shape = {"split": field_kinds.name, "n": field_kinds.finite}
_AUDIT: Shape = {
    **dict.fromkeys(AUDIT, number),
    "contradicted": field_kinds.flag,
    "kind": field_kinds.name,
    "noise_test": {
        "accused_by": field_kinds.names,
        "interval": field_kinds.interval,
        "p_values": field_kinds.numbers,
        ANY: field_kinds.plain,
    },
    "membership_inference": {
        **dict.fromkeys(("members", "others", "draws", "confidence"), number),
        ANY: {
            "auc": number, "auc_interval": field_kinds.interval,
            "tpr_at_fpr": {ANY: {"tpr": number, "interval": field_kinds.interval, "false_positives": number}},
            "roc": {"fpr": field_kinds.sequence, "tpr": field_kinds.sequence},
        },
    },
}  # fmt: skip
_RESULT: Mapping[str, Shape] = {
    "metrics": field_kinds.numbers,
    "intervals": {ANY: field_kinds.interval},
    "reference": _SPLIT,
    "tested_on": _SPLIT,
    "real_baseline": {"distances": _SPLIT, "accuracy": _SPLIT},
    **dict.fromkeys(("intervals_note", "n_note", "values"), field_kinds.sentence),
    **dict.fromkeys(("n_samples", "n_before", "seed", "trainable_parameters"), number),
    "trainable_parameters_by_component": field_kinds.numbers,
    "classifiers": {ANY: {ANY: field_kinds.plain}},
    "extractors": {ANY: {ANY: field_kinds.plain}},
    "neighbours": {"precision, recall": number, "density, coverage": number},
    "noise": {ANY: {ANY: number}},
    "release": {"noise_multiplier": number},
    "choice": CHOICE,
    "audit": _AUDIT,
    "seconds": {ANY: field_kinds.finite},
    "peak_memory_bytes": field_kinds.finite,
    "device": field_kinds.device,
    "images_compared": field_kinds.flag,
}

HARDWARE = ("system", "cpu", "gpu")
_PROVENANCE: Mapping[str, Shape] = {
    "git": {"sha": field_kinds.name, "dirty": field_kinds.name},
    "versions": {ANY: field_kinds.words},
    "hardware": dict.fromkeys(HARDWARE, field_kinds.sentence),
    "seeds": {"public": number},
    "reproducible_noise": field_kinds.flag,
}
PROVENANCE: Mapping[str, Why] = dict.fromkeys(_PROVENANCE, Why.MACHINE)

KEPT_FIELDS: Mapping[str, Mapping[str, str]] = {
    "privacy.json": {},
    "result.json": {},
    "metrics.jsonl": {},
    "provenance.json": {
        "start": "start and end tell how long the training took",
        "end": "start and end tell how long the training took",
        "restarts": "how often a cluster interrupted it is nobody's business",
        "seconds": "result.json has it",
        "slurm": "numbers and partitions of the owner's cluster",
    },
}
"""Fields that runs write and that stay, with the reason."""

WANDB: Mapping[str, Why] = {
    "run id": Why.MACHINE,
    "run name": Why.SETTING,
    "project": Why.LABEL,
    "group": Why.LABEL,
    "tags": Why.LABEL,
    "job type": Why.SETTING,
    "config": Why.SETTING,
    "history: the columns of ROWS": Why.NOISED,
    "history: _step": Why.SETTING,
    "history: _timestamp, _runtime": Why.AFTER,
    "run: start time, runtime at exit": Why.AFTER,
    "summary: privacy": Why.SETTING,
    "summary: metrics and result": Why.UNCOVERED,
    "media: samples": Why.GENERATED,
    "table: baselines": Why.UNCOVERED,
    "artifact: adapter": Why.NOISED,
}
"""The data that W&B is sent. The run begins there when the private training has ended, and its rows arrive
together: neither its clocks nor the times of arrival see a step. Metrics that epsilon does not cover carry a
note. The run's id is random.

The start time is of what comes after the training. Where jobs run one after another, the time from one run's
start to the next one's bounds the duration of a training from above.
"""


def settings(config: Config) -> dict[str, Any]:
    """The configuration as W&B gets it: without what `_hidden` lists.

    `privacy.insecure` says whether there was a seed of the noise.
    """
    values = dataclasses.asdict(config)
    for setting in _hidden(config):
        *path, name = setting.split(".")
        group = values
        for part in path:
            group = group[part]
        del group[name]
    values["privacy"]["insecure"] = config.privacy.insecure_seed is not None
    return values


def exported_settings(config: Config) -> dict[str, Any]:
    """The settings of an export: those of `settings` that can change the result, as a job takes them."""
    values = settings(config)
    del values["resources"], values["privacy"]["insecure"]
    values["tracking"] = {"private_loss": config.tracking.private_loss}
    return values


def shown_fingerprint(config: Config) -> str:
    """The fingerprint with the defaults in place of what may not leave, so that it confirms no guess of that.

    It is the run directory's where nothing of that kind was given.
    """
    shown, default = copy.deepcopy(config), Config()
    for setting in _hidden(config):
        *path, name = setting.split(".")
        setattr(_at(shown, path), name, getattr(_at(default, path), name))
    return fingerprint(shown)


def run_name(config: Config, overrides: Sequence[str]) -> str:
    """The run's name in W&B: the words that may be shown, and the fingerprint of the settings that may be."""
    public = _size_is_public(config.privacy.adjacency)
    words = [word for word in overrides if public or word.lstrip("+~").partition("=")[0] not in SIZES]
    return f"{readable(words)}-{shown_fingerprint(config)}"


def privacy(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of privacy.json that may leave. Raises UserError for a value not of its field's kind."""
    public = _size_is_public(str(record.get("adjacency")))
    return {
        name: field_kinds.shaped(name, value, _KINDS.get(name, number))
        for name, value in record.items()
        if name in PRIVACY and (public or PRIVACY[name] is not Why.SIZE)
    }


def is_released(record: Mapping[str, Any]) -> bool:
    """Whether privacy.json states a budget of its own for the metrics, with noise that is secret."""
    release = record.get("release")
    if not isinstance(release, Mapping) or release.get("reproducible_noise") is not False:
        return False
    epsilon = release.get("epsilon")
    return isinstance(epsilon, int | float) and math.isfinite(epsilon) and not isinstance(epsilon, bool)


def uncovered(record: Mapping[str, Any], *, public: bool, released: bool) -> list[str]:
    """The metrics of result.json that are not known to be covered: what nobody knows is not covered.

    Args:
        record: the whole content.
        public: all images are public, so that nothing needs to be covered.
        released: see `is_released`.

    Raises UserError for a metric that is no number.
    """
    said = record.get("private_metrics")
    named = {str(name) for name in said} if isinstance(said, list | tuple) else set()
    metrics = [*_numbers(record, "metrics"), *_intervals(record)]
    audit = [f"audit.{name}" for name in _audit(record) if name not in AUDIT]
    if public:
        return []
    covered = {
        name
        for name in metrics
        if name in GENERATED_METRICS or (released and name.startswith(RELEASED_METRICS))
    }
    return [name for name in dict.fromkeys([*metrics, *audit]) if name not in covered - named]


def result(
    record: Mapping[str, Any], *, public: bool, released: bool, with_uncovered: bool
) -> dict[str, Any]:
    """The fields of result.json that may leave.

    Guarantee: on private data a metric leaves unmarked only if it is known to be computed from generated
    images alone, or read from a sum with noise of its own. A record that does not say which metrics are
    private, or says that none is, makes no metric covered.

    Args:
        record: the whole content.
        public: all images are public.
        released: see `is_released`; one that dp-lora-evaluate made is not of a record without its metrics.
        with_uncovered: also what no epsilon covers, named under `private_metrics` with a note; else its names
            are listed under `left_out`.

    Raises UserError for a value of another kind than its field's.
    """
    released = released and any(name.startswith(RELEASED_METRICS) for name in _numbers(record, "metrics"))
    private = uncovered(record, public=public, released=released)
    # What the record says is private is for `uncovered`; what leaves says it anew.
    shown = {
        name: field_kinds.shaped(name, value, _RESULT[name])
        for name, value in record.items()
        if name in _RESULT
    }
    if shown.get("seconds") is not None:
        shown["seconds"] = {name: coarse(value) for name, value in shown["seconds"].items()}
    if shown.get("peak_memory_bytes") is not None:
        shown["peak_memory_bytes"] = power_of_two(int(shown["peak_memory_bytes"]))
    note = UNCOVERED_NOTE if private else ""
    if with_uncovered:
        return {**shown, "private_metrics": private, "private_metrics_note": note}
    if not public:
        _leave_sizes_out(shown, released=released)
    for group, prefix in (("metrics", ""), ("intervals", ""), ("audit", "audit.")):
        if group in shown:
            shown[group] = {k: v for k, v in shown[group].items() if f"{prefix}{k}" not in private}
    shown |= {"private_metrics": [], "private_metrics_note": ""}
    return {**shown, "left_out": private, "left_out_note": note} if private else shown


def _leave_sizes_out(shown: dict[str, Any], *, released: bool) -> None:
    """Leaves out how many private images were compared with, unless the number is read from a noised sum."""
    inference = shown.get("audit", {}).get("membership_inference") or {}
    for name in ("members", "others"):
        inference.pop(name, None)
    for name in ("tested_on", "real_baseline", *(() if released else ("noise", "release", "n_note"))):
        shown.pop(name, None)
    if "reference" in shown:
        reference = field_kinds.mapping("reference", shown["reference"])
        shown["reference"] = {"split": field_kinds.name("reference.split", reference.get("split"))}
        if released:
            shown["reference"]["n"] = field_kinds.finite("reference.n", reference.get("n"))


def _numbers(record: Mapping[str, Any], field: str) -> dict[str, Any]:
    return field_kinds.numbers(field, record.get(field, {}))


def _intervals(record: Mapping[str, Any]) -> dict[str, Any]:
    found = field_kinds.mapping("intervals", record.get("intervals", {}))
    return {
        field_kinds.name("intervals", name): field_kinds.interval(f"intervals.{name}", ends)
        for name, ends in found.items()
    }


def _audit(record: Mapping[str, Any]) -> dict[str, Any]:
    found = field_kinds.mapping("audit", record.get("audit", {}))
    return {field_kinds.name("audit", name): value for name, value in found.items()}


def row(record: Mapping[str, Any], *, private_loss: bool) -> dict[str, Any]:
    """The fields that may leave of a line of metrics.jsonl that a private stage wrote.

    Args:
        record: the line.
        private_loss: the run reads the loss from its noised sums; a loss of any other run stays.

    Raises UserError for a value that is no number.
    """
    known = [name for name in ROWS if private_loss or name != "private_loss"]
    shown = {name: number(name, value) for name, value in record.items() if name in known}
    if record.get("stage") not in STAGES:
        raise UserError(f"stage: expected one of {', '.join(STAGES)}")
    return {"stage": record["stage"], **shown}


def provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of provenance.json that may leave. Raises UserError for a value not of its field's kind."""
    shown = {
        name: field_kinds.shaped(name, value, _PROVENANCE[name])
        for name, value in record.items()
        if name in PROVENANCE
    }
    if shown.get("hardware") is not None:
        shown["hardware"] = dict.fromkeys(HARDWARE) | shown["hardware"]
    return shown


def _hidden(config: Config) -> list[str]:
    """Settings that may not leave.

    They are `PRIVATE_SETTINGS`, but for the name of weights that ship with the package, and under
    `add_or_remove` the sizes of the private splits.
    """
    hidden = [name for name in PRIVATE_SETTINGS if not (name == "model.pretrained" and is_shipped(config))]
    return hidden if _size_is_public(config.privacy.adjacency) else [*hidden, *SIZES]


def _at(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def is_shipped(config: Config) -> bool:
    """Whether `model.pretrained` names weights of this package."""
    name = config.model.pretrained
    return name is not None and re.fullmatch(r"[\w-]+", name) is not None and (WEIGHTS / name).is_dir()


def _size_is_public(adjacency: str) -> bool:
    """Whether the number of images is public, by the relation's name in the configuration or privacy.json."""
    return adjacency.replace("_", " ").startswith(("zero out", "one image contributes nothing"))
