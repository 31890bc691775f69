"""The model card of an adapter: what was spent, what the guarantee covers and what it does not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dp_lora.records.coverage import coverage, lines_of_search
from dp_lora.records.rounding import at_most


@dataclass(frozen=True)
class TextToImage:
    """The adapter of a text-to-image model."""

    prompt: str
    """Of a class, with {} for its name."""
    classes: Sequence[str]
    captions: bool = False
    """Whether it was trained with a caption of each image."""
    in_place: bool = False
    """Whether parameters were trained that no adapter holds."""
    base_precision: str = "float32"
    """Of the frozen weights while it was trained."""


NO_GUARANTEE = "**This adapter has NO privacy guarantee: {reason}.**"


def no_guarantee(record: Mapping[str, Any], *, reproducible_noise: bool = False) -> str | None:
    """One sentence that says why there is no guarantee, or null when there is one.

    Args:
        record: of privacy.json; no finite epsilon means no noise, and no guarantee of the adapter that the
            training started from means none for the images behind that.
        reproducible_noise: the noise came from a number in the configuration.
    """
    epsilon = record["epsilon"]
    if epsilon is None or not math.isfinite(float(epsilon)):
        reason = "it was trained without noise (epsilon is infinite)"
    elif reproducible_noise:
        reason = (
            "its noise was derived from a seed (reproducible noise), so whoever knows the seed can take "
            "the noise away"
        )
    elif record.get("unprotected_start"):
        reason = (
            "the training started from an adapter without one, and the images behind that are not protected"
        )
    else:
        return None
    return NO_GUARANTEE.format(reason=reason)


def model_card(
    record: Mapping[str, Any],
    *,
    base_model: str,
    data_name: str,
    trainable: Sequence[str],
    rank: int | None,
    target_modules: Sequence[str],
    parameters: int,
    versions: Mapping[str, str | None] | None = None,
    reproducible_noise: bool = False,
    license_name: str | None = None,
    text: TextToImage | None = None,
) -> str:
    """The README.md of an adapter, in Markdown with the front matter of the Hugging Face hub.

    When there is no guarantee the first line of the text says so and no epsilon is claimed. The number of
    private images is not stated.

    Args:
        record: the content of privacy.json.
        base_model: name or folder of the model that the adapter belongs to.
        data_name: name of the private image set, never its path.
        trainable: components that were trained.
        rank: of the LoRA update; null when there is none.
        target_modules: ends of the names of the adapted modules.
        parameters: number of trained parameters.
        versions: of the packages that made it.
        reproducible_noise: the noise came from a number in the configuration.
        license_name: hub identifier of the adapter's licence; null leaves the entry out.
        text: what only the adapter of a text-to-image model has; null of another one.
    """
    warning = no_guarantee(record, reproducible_noise=reproducible_noise)
    parts = [
        _front_matter(base_model, license_name, private=warning is None, text=text is not None),
        *([warning] if warning else []),
        f"# Adapter of {base_model} for {data_name}",
        *([_protected(record)] if warning is None else []),
        _summary(data_name, trainable, rank, target_modules, parameters),
        *_choice(record),
        *([_prompts_section(text)] if text is not None else []),
        _privacy_section(record, guaranteed=warning is None),
        _loading_section(base_model, lora=rank is not None, text=text),
    ]
    if versions:
        known = [f"{name} {version}" for name, version in versions.items() if version]
        parts.append("## Made with\n\n" + ", ".join(known) + ".")
    return "\n\n".join(parts) + "\n"


def _protected(record: Mapping[str, Any]) -> str:
    """Whom the guarantee protects, for the first lines."""
    # Of a search, the largest that it states: for somebody in the training and among the held-out images.
    epsilon = max([record["epsilon"], *record.get("search", {}).get("epsilon", {}).values()], key=float)
    bound = f"with epsilon {at_most(epsilon)} at delta {at_most(record['delta'])}"
    if record.get("unit") == "person":
        return f"**Protects each person with all of their images**, {bound}."
    return f"**Protects each single image**, {bound}; a person with several images has less."


def _front_matter(base_model: str, license_name: str | None, *, private: bool, text: bool) -> str:
    guarantee = ["differential-privacy", "dp-sgd"] if private else ["not-private"]
    kind = ["text-to-image", "lora"] if text else []
    lines = ["---", f"library_name: {'diffusers' if text else 'peft'}"]
    if text:
        lines.append("pipeline_tag: text-to-image")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        # The hub takes its own names only.
        lines.append(f"base_model: {json.dumps(base_model)}")
    if license_name:
        lines.append(f"license: {json.dumps(license_name)}")
    tags = [f"- {tag}" for tag in ("latent-diffusion", *kind, *guarantee)]
    return "\n".join([*lines, "tags:", *tags, "---"])


def _summary(
    data_name: str,
    trainable: Sequence[str],
    rank: int | None,
    target_modules: Sequence[str],
    parameters: int,
) -> str:
    text = (
        f"A latent diffusion model fine-tuned on the image set {data_name}: {parameters:,} trained "
        f"parameters ({', '.join(trainable)})"
    )
    if rank is not None:
        text += f"; LoRA of rank {rank} on {', '.join(f'`{name}`' for name in target_modules)}"
    return text + "."


_CHOSEN_BY = {
    "salient": "by the first {scout_steps} noisy steps of the training, which the epsilon counts",
    "salient_public": "by {scout_steps} batches of the public images, which costs no privacy",
    "random": "by a seed, which costs no privacy",
}


def _choice(record: Mapping[str, Any]) -> list[str]:
    """Which matrices have adapters, where a run chose them, with the scores of all."""
    if (choice := record.get("choice")) is None:
        return []
    chosen, scores = choice["chosen"], choice.get("scores")
    how = _CHOSEN_BY[choice["by"]].format(**choice)
    lines = [
        "## Matrices",
        f"{choice['number']} of {choice['of']} matrices have adapters, chosen {how} "
        f"(share {choice['share']:g}).",
    ]
    if scores is None:
        return ["\n\n".join([*lines, bullets([f"`{name}`" for name in chosen])])]
    rows = [f"| `{name}` | {value:.3g} | {'yes' * (name in chosen)} |" for name, value in scores.items()]
    return ["\n\n".join([*lines, "\n".join(["| matrix | score | chosen |", "|---|---|---|", *rows])])]


def _prompts_section(text: TextToImage) -> str:
    one = text.prompt.replace("{}", text.classes[0]) if text.classes else text.prompt
    lines = [
        "## Prompts",
        f"The prompt of a class is {_code(text.prompt)}, such as {_code(one)}."
        + (" It was trained with a caption of each image." if text.captions else ""),
        f"Classes: {', '.join(_code(name) for name in text.classes)}.",
    ]
    return "\n\n".join(lines)


def _code(text: str) -> str:
    """`text` as code in Markdown, in one line."""
    plain = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", plain)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {plain} {fence}" if longest else f"`{plain}`"


def _privacy_section(record: Mapping[str, Any], *, guaranteed: bool) -> str:
    if not guaranteed:
        return "## Privacy\n\nNone. Treat this adapter like the private images that it was trained on."
    lines = [
        "## Privacy",
        f"The training of this adapter satisfies **({at_most(record['epsilon'])}, "
        f"{at_most(record['delta'])})-differential privacy** (epsilon, delta). {_relation(record)}".strip(),
        *_earlier(record),
        *lines_of_search(record, at_most),
        _settings_table(record),
        "**What the guarantee covers**",
        bullets(record.get("covers") or coverage(str(record.get("unit")))[0]),
        "**What it does not cover**",
        bullets(record.get("does_not_cover") or coverage(str(record.get("unit")))[1]),
    ]
    return "\n\n".join(lines)


def _earlier(record: Mapping[str, Any]) -> list[str]:
    """What the earlier trainings on the same images have to do with the epsilon, where there were any."""
    if not (earlier := record.get("earlier_trainings")):
        return []
    released = any(one["sample_rate"] == 1 and one["steps"] == 1 for one in earlier)
    what = "trainings or releases" if released else "trainings"
    them = "one earlier training" if len(earlier) == 1 else f"{len(earlier)} earlier {what}"
    why = (
        "also if its settings were chosen after results of the earlier ones were seen, for a total that was "
        "fixed beforehand (Renyi filter)"
        if record["accountant"] == "Renyi filter"
        else "provided that all settings were fixed before the first of them began"
    )
    return [
        f"The training started from the adapter of {them} on the same images, and the epsilon counts all of "
        f"them, {why}. By itself it spent epsilon {at_most(record['epsilon_of_this_training'])}; the noise, "
        "sample rate and steps below are its own."
    ]


def _relation(record: Mapping[str, Any]) -> str:
    """In plain words, which sets of private images can hardly be told apart."""
    adjacency = str(record["adjacency"])
    if record.get("unit") == "person":
        known = " The number of persons is public." if adjacency.startswith("zero out") else ""
        return (
            "Take two sets of images that are the same, except that one person contributes nothing in one of "
            "them, none of their images, captions and labels, however many they are: the adapter hardly "
            f"tells which of the two it was trained on.{known} How many images there are is private."
        )
    if adjacency.startswith("zero out"):
        return (
            "Take two sets of images that are the same, except that one image contributes nothing in one of "
            "them: the adapter hardly tells which of the two it was trained on. The number of training "
            "images is public."
        )
    if adjacency.startswith("add or remove"):
        return (
            "Take two sets of images that are the same but for one image, which is in one of them only: the "
            "adapter hardly tells which of the two it was trained on."
        )
    return ""


def with_public_number(card: str, record: Mapping[str, Any]) -> str:
    """The card of an earlier version with the relation that holds, since its sample rate tells their number.

    Args:
        card: from `model_card` of an earlier version, which named the relation "add or remove one image".
        record: of privacy.json, with the relation that holds.
    """
    card = re.sub(r"(\| adjacency [^|]*\| )add or remove[^|]*\|", rf"\g<1>{record['adjacency']} |", card)
    claim = re.compile(r"(-differential privacy\*\* \(epsilon, delta\)\.)[^\n]*")
    return claim.sub(rf"\g<1> {_relation(record)}", card)


_BOUNDS = (("epsilon", "epsilon"), ("delta", "delta"))
_SETTINGS = (
    ("accountant", "accountant"),
    ("adjacency", "adjacency (which data sets are neighbours)"),
    ("noise_multiplier", "noise multiplier (sigma)"),
    ("noise_multiplicity", "noise multiplicity (draws per {unit}, folded before the clip)"),
    ("max_grad_norm", "clipping norm C"),
    ("sample_rate", "sample rate (Poisson)"),
    ("steps", "noisy steps"),
)


def _settings_table(record: Mapping[str, Any]) -> str:
    rows = [f"| {label} | {at_most(record[key])} |" for key, label in _BOUNDS]
    unit = record.get("unit", "image")
    rows += [
        f"| {label.format(unit=unit)} | {_nearest(record[key])} |"
        for key, label in _SETTINGS
        if key in record
    ]
    others = record.get("epsilon_by_accountant") or {}
    rows += [f"| epsilon by {name} | {at_most(value)} |" for name, value in others.items()]
    return "\n".join(["| quantity | value |", "|---|---|", *rows])


def bullets(texts: str | Sequence[str]) -> str:
    """A list in Markdown; of one text, a list of one."""
    return "\n".join(f"- {text}" for text in ([texts] if isinstance(texts, str) else texts))


def _nearest(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_search(card: str, record: Mapping[str, Any]) -> str:
    """The card of the best trial of a private search, with what the search spent, not the trial.

    Args:
        card: of the trial, from `model_card`.
        record: the content of privacy.json of the search's winner.
    """
    before, _, rest = card.partition("## Privacy")
    _, loading, after = rest.partition("## Loading")
    assert loading, "every card has a section on loading"
    before = re.sub(r"^\*\*Protects .*$", lambda _: _protected(record), before, flags=re.MULTILINE)
    return before + _privacy_section(record, guaranteed=True) + "\n\n" + loading + after


def _loading_section(base_model: str, *, lora: bool, text: TextToImage | None) -> str:
    if text is not None:
        return _pipeline_section(base_model, text, lora=lora)
    trained = (
        "`trained.safetensors`, where there is one, holds the parameters that were trained in place by their "
        "names in the model: those that begin with `unet.` go into the UNet by `load_state_dict(..., "
        "strict=False)`, and row i of `class_embedder.weight` is the condition of class i, to be given as "
        "`encoder_hidden_states` of shape [batch, 1, width], or in place of a row of the network's table. "
        "Its metadata lists the classes in that order."
    )
    if not lora:
        return f"## Loading\n\n{trained}"
    code = [
        "```python",
        "from diffusers import AutoModel",
        "from peft import PeftModel",
        "",
        "# A diffusion transformer is in the subfolder transformer.",
        f'unet = AutoModel.from_pretrained({json.dumps(base_model)}, subfolder="unet")',
        'unet = PeftModel.from_pretrained(unet, ".")  # the folder of this file',
        "unet.eval()",
        "```",
    ]
    return "\n".join(["## Loading", "", *code, "", trained])


def _pipeline_section(base_model: str, text: TextToImage, *, lora: bool) -> str:
    """How a pipeline of diffusers loads the adapter of a text-to-image model."""
    code = [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base_model)})",
    ]
    notes = []
    if text.in_place:
        code = [
            *code[:1],
            "from safetensors.torch import load_file",
            *code[1:],
            'trained = load_file("trained.safetensors")  # in the folder of this file',
            'trained = {name.removeprefix("unet."): value for name, value in trained.items()}',
            "# Before load_lora_weights, which renames parameters. A transformer is pipe.transformer.",
            "pipe.unet.load_state_dict(trained, strict=False)",
        ]
        notes.append(
            "`trained.safetensors` holds the parameters that were trained in place."
            + (" `load_lora_weights` alone leaves them out, and so does `kohya.safetensors`." if lora else "")
        )
    if lora:
        code.append('pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")')
        notes.append(
            "ComfyUI and AUTOMATIC1111's webui read `kohya.safetensors`, where there is one; PEFT reads "
            "`adapter_model.safetensors`."
        )
    if text.base_precision != "float32":
        notes.append(
            f"The frozen weights were in {text.base_precision} while it was trained. It loads into the "
            "pipeline in any precision; predictions then differ by the rounding of these weights."
        )
    return "\n".join(["## Loading", "", "```python", *code, "```", "", " ".join(notes)])
