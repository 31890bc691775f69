"""Images from a released adapter, for free: what is computed from it alone costs no privacy.

Guarantee: neither the private images, nor the ledger, nor the index, nor the record of a run's steps is read,
and nothing is charged. What is written is a function of the adapter, the pre-trained model and the settings
in `sampling.json`; labels are as many of each class as is asked for, never as many as the private set has.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dp_lora.config.checks import check
from dp_lora.config.load import WEIGHTS, read_config
from dp_lora.config.schema import EXPORTS, Config, DataConfig, SamplerConfig
from dp_lora.errors import UserError
from dp_lora.records.run_directory import check_records, is_whole, is_whole_archive
from dp_lora.storage.files import check_writable, file_lock, read_json, write_atomic, write_json
from dp_lora.storage.imports import uncollected

if TYPE_CHECKING:
    from torch import Tensor

    from dp_lora.models.latent_diffusion import LatentDiffusion
    from dp_lora.models.sample import Samples

RECORD = "sampling.json"
"""What was drawn, beside it."""

FOLDER = "samples"
"""In a run directory: a folder for each set of images that was drawn afterwards."""

IMAGES = "images"
"""The folder of PNG files beside samples.npz."""

FORMATS = EXPORTS

_NOT_RECORDED = ("num_samples", "batch_size", "classes", "export")
"""Fields of the sampler that change no image, or that stand in `sampling.json` by themselves."""

NOTE = (
    "Computed from the adapter, the pre-trained model and these settings alone: covered by the adapter's own "
    "epsilon, which its card states, at no further cost."
)


@dataclass(frozen=True)
class Asked:
    """Which images are drawn, from what."""

    place: Path
    """A run directory, or the folder of an adapter."""
    sampler: SamplerConfig
    seed: int
    classes: Mapping[str, int] | None = None
    """The number of images of each class; None: `sampler.num_samples`, as many of each."""
    prompt: str | None = None
    """Of a text-to-image model: with {} for the name of a class, or of all images alike."""
    pretrained: str | None = None
    """The pre-trained model, where the run or the adapter does not tell."""
    name: str | None = None
    out: Path | None = None
    format: str = "npz"
    device: str = "auto"
    progress: str = "auto"


@dataclass(frozen=True)
class Source:
    """An adapter with what it belongs to."""

    adapter: Path
    run: Path | None
    config: Config
    """Of the run, or the defaults."""


def source_of(place: Path) -> Source:
    """The adapter of a run, or in a folder that somebody was given without its run.

    Raises UserError when there is none.
    """
    if (place / "config.yaml").exists() and not _is_adapter(place):
        adapter = place / "adapter"
        if not _is_adapter(adapter):
            raise UserError(
                f"{place}: has no adapter yet; expected a run whose stage finetune has ended: give its "
                "command again"
            )
        return Source(adapter, place.resolve(), read_config(place / "config.yaml"))
    if not _is_adapter(place):
        raise UserError(
            f"{place}: expected a run directory, or the folder of an adapter (adapter_model.safetensors or "
            "trained.safetensors)"
        )
    # Nothing but the sampler is asked of these settings; the names are those of no set.
    some = DataConfig("none", public=True)
    return Source(place, None, Config(data=some, public_data=some))


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("adapter_model.safetensors", "trained.safetensors"))


class Drawn(NamedTuple):
    """What was drawn."""

    folder: Path
    number: int
    note: str
    """What covers it."""


def draw(asked: Asked) -> Drawn:
    """Draws the images into a folder that appears whole; one that is whole already is left as it is.

    Raises UserError for what does not fit the adapter or the model, before anything is written.
    """
    from dp_lora.jobs.device import device_of

    with uncollected():
        from dp_lora.models import sample

    source = source_of(asked.place)
    number = asked.sampler.num_samples if asked.classes is None else sum(asked.classes.values())
    config = replace(
        source.config, sampler=replace(asked.sampler, num_samples=number, classes=None), seed=asked.seed
    )
    config.resources.device = asked.device
    check(config)
    device = device_of(config)
    base = base_of(source, asked.pretrained)
    model = _model(source, asked, base)
    labels = sample.labels_of(model.classes, asked.sampler.num_samples, asked.classes, "classes")
    record = _record(source, base, model, asked, labels)
    folder = _folder(source, asked, record)
    if not _is_drawn(folder, record, len(labels)):
        check_writable(folder, f"out={folder}")
        with _whole(folder, lambda: _is_drawn(folder, record, len(labels))) as partial:
            if partial is not None:
                samples = sample.draw(model.to(device), labels, asked.sampler, asked.seed, asked.progress)
                sample.save(samples, partial)
                if asked.format == "png":
                    write_images(samples, partial)
                write_json(partial / RECORD, {**record, "samples_sha256": samples_digest(partial)})
    return Drawn(folder, len(labels), record["note"])


def samples_digest(folder: Path) -> str:
    """SHA-256 of `folder`/samples.npz, hexadecimal."""
    with (folder / "samples.npz").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_drawn(folder: Path, record: Mapping[str, Any], number: int) -> bool:
    """Whether the folder holds these images, all of them and whole; False if they have to be drawn again.

    Raises UserError for a folder with anything else in it.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected the name of a new folder")
    if not any(folder.iterdir()):
        return False
    found = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    if not isinstance(found, dict) or found.get("settings") != record["settings"]:
        raise UserError(
            f"{folder}: holds something else than these images; expected a new or an empty folder"
        )
    pictures = (
        len(list((folder / IMAGES).rglob("*.png"))) if record["settings"]["format"] == "png" else number
    )
    return (
        pictures == number
        and (folder / "samples.png").is_file()
        and is_whole_archive(folder / "samples.npz")
        and found.get("samples_sha256") == samples_digest(folder)
    )


@contextmanager
def _whole(folder: Path, is_there: Callable[[], bool]) -> Iterator[Path | None]:
    """A folder that takes the place of `folder` at the end of the block; None if another made it first."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.is_dir() and any(partial.iterdir()) and not (partial / ".lock").exists():
        raise UserError(f"{partial}: holds something else than images half drawn; expected no such folder")
    partial.mkdir(parents=True, exist_ok=True)
    with file_lock(partial / ".lock"):
        if is_there() or not partial.exists():
            yield None
            return
        for path in partial.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield partial
        (partial / ".lock").unlink()
        if folder.exists():
            shutil.rmtree(folder)  # of the same images, damaged, or empty
        partial.replace(folder)


def base_of(source: Source, given: str | None) -> Path:
    """The folder of the pre-trained model, which is the one that the adapter was trained on.

    `given` names it, or it is found by the run or the adapter. Raises UserError for another one, for none,
    and for a damaged adapter.
    """
    from dp_lora.models.folders import find

    if source.run is not None:
        is_whole(source.run, "finetune")
    folder = find(given) if given is not None else _pretrained(source)
    check_base(source, folder)
    return folder


def _model(source: Source, asked: Asked, base: Path) -> LatentDiffusion:
    """The pre-trained model with the adapter, whose classes or prompts are those that are asked for."""
    from dp_lora.models import adapters
    from dp_lora.models.folders import load

    known, own = adapters.conditions(source.adapter), source.config.model
    usual = own.prompt if known is None else known[0]
    prompt = usual if asked.prompt is None else asked.prompt
    # Without its run, nothing says the size that an adapter was trained at: the published one.
    size = None if source.run is None else source.config.data.image_size
    model = load(base, prompt, image_size=size, prompt_length=own.prompt_length, precision=own.base_precision)
    if asked.prompt is not None and model.prompts is None:
        raise UserError(f"prompt={asked.prompt}: the model takes no prompts; expected none")
    names = adapters.class_names(source.adapter) or _class_names(source) or model.classes
    if model.prompts is not None and "{}" not in prompt:
        # One prompt for all images.
        names = (prompt,)
    adapters.restore(model, source.adapter, names)
    return model


def _pretrained(source: Source) -> Path:
    """The folder of the pre-trained model that the run was made from, or that the adapter names."""
    from dp_lora.config.identity import pretrained_fingerprint
    from dp_lora.models.folders import find

    if source.run is None:
        base = _named_base(source)
        if base is None:
            raise UserError(
                f"{source.adapter}: does not say which model it belongs to; expected pretrained=MODEL: "
                "shipped weights, a folder, or a pipeline on the hub"
            )
        try:
            return find(base)
        except UserError as error:
            raise UserError(
                f"{source.adapter}: belongs to {base}, which is not here; expected pretrained=FOLDER"
            ) from error
    config = source.config
    if config.model.pretrained is not None:
        return find(config.model.pretrained)
    name = f"{config.model.name}-{pretrained_fingerprint(config)}"
    folder = Path(config.paths.cache).expanduser() / "models" / name
    if not folder.is_dir():
        raise UserError(
            f"{folder}: the pre-trained model of this run is missing; expected pretrained=FOLDER, or the "
            "run's own command, which makes it again"
        )
    return folder


def _named_base(source: Source) -> str | None:
    """The name of the pre-trained model in adapter_config.json; None where nothing says it."""
    path = source.adapter / "adapter_config.json"
    found = read_json(path).get("base_model_name_or_path") if path.exists() else None
    return found if isinstance(found, str) else None


def check_base(source: Source, folder: Path) -> None:
    """Raises UserError when the adapter was trained on other weights than those in `folder`.

    It says so by eight digits of their SHA-256, where the model has no name of its own.
    """
    from dp_lora.models.folders import sha256_of_weights

    base = _named_base(source) or ""
    digits = re.search(r"-([0-9a-f]{8})$", base)
    if digits is not None:
        expected = digits[1]
    elif (WEIGHTS / base / "unet").is_dir():
        expected = sha256_of_weights(WEIGHTS / base)[:8]
    else:
        return
    if folder.name == base:
        return
    found = sha256_of_weights(folder)[:8]
    if found != expected:
        raise UserError(
            f"{source.adapter}: was trained on the model {base}, and the weights in {folder} are others "
            f"({found}); expected pretrained=MODEL with those of the training"
        )


def _class_names(source: Source) -> tuple[str, ...] | None:
    """The names of the classes that a run had, as its samples or its own record say them."""
    from dp_lora.models import sample

    if source.run is None:
        return None
    if (source.run / "samples.npz").exists():
        return sample.load(source.run).classes
    record = source.run / "checkpoint" / "content.json"
    return tuple(read_json(record)["classes"]) if record.exists() else None


def _record(
    source: Source, base: Path, model: LatentDiffusion, asked: Asked, labels: Tensor
) -> dict[str, Any]:
    """What `sampling.json` says: the settings that the images follow from, and what covers them."""
    import torch

    from dp_lora.models.folders import sha256_of_weights
    from dp_lora.records.provenance import versions

    counts = torch.bincount(labels, minlength=len(model.classes)).tolist()
    sampler = {k: v for k, v in asdict(asked.sampler).items() if k not in _NOT_RECORDED}
    settings = {
        "adapter_sha256": digest_of(source.adapter),
        "model_sha256": sha256_of_weights(base),
        "sampler": sampler,
        "seed": asked.seed,
        "classes": dict(zip(model.classes, counts, strict=True)),
        "prompt": model.prompts.template if model.prompts is not None else None,
        "format": asked.format,
    }
    return {"note": note_of(source), "settings": settings, "versions": versions()}


def digest_of(adapter: Path) -> str:
    """SHA-256 of the weights in the folder of an adapter."""
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def note_of(source: Source) -> str:
    """What covers the images: the adapter's epsilon, or, of a run without a guarantee, why nothing does."""
    from dp_lora.records.card import no_guarantee

    if source.run is None:
        return _note_of_card(source.adapter / "README.md")
    check_records(source.run)
    path = source.run / "privacy.json"
    if not path.exists():
        # Without its path: the folder of the images may leave.
        return "The run's privacy.json is missing, so it is not known what the adapter spent."
    found = read_json(path)
    nothing = no_guarantee(found, reproducible_noise=found["reproducible_noise"])
    return NOTE if nothing is None else nothing.strip("*")


def is_protected(source: Source) -> bool:
    """Whether an adapter has a privacy guarantee, or needs none, as far as its records or its card say."""
    from dp_lora.records.card import NO_GUARANTEE

    if source.run is not None and source.config.data.public:
        path = source.run / "privacy.json"
        return not (path.exists() and read_json(path).get("unprotected_start"))
    return not note_of(source).startswith(NO_GUARANTEE.partition("{")[0].strip("* "))


def _note_of_card(card: Path) -> str:
    """What the card of an adapter without its run says about its guarantee."""
    from dp_lora.records.card import NO_GUARANTEE

    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if not any("epsilon" in line for line in lines):
        return "The adapter has no card that states an epsilon, so it is not known what it spent."
    begins = NO_GUARANTEE.partition("{")[0]
    return next((line.strip("*") for line in lines if line.startswith(begins)), NOTE)


def _folder(source: Source, asked: Asked, record: Mapping[str, Any]) -> Path:
    """The folder for the images: as asked for, or by a name of their own in the run directory."""
    if asked.out is not None:
        if asked.out.is_symlink():
            raise UserError(f"out={asked.out}: is a link; expected a new or an empty folder")
        return asked.out.absolute()
    if source.run is None:
        raise UserError(f"{source.adapter}: an adapter without its run; expected out=FOLDER for the images")
    identity = hashlib.sha256(json.dumps(record["settings"], sort_keys=True).encode()).hexdigest()[:8]
    return source.run / FOLDER / one_name(asked.name or f"{asked.sampler.name}-{identity}")


def one_name(name: str) -> str:
    """`name`, if it can be that of a new folder or file. Raises UserError if not."""
    if not re.fullmatch(r"(?!\.)[^/\x00-\x1f]{1,100}", name) or len(os.fsencode(name)) > 200:
        raise UserError(f"name={name}: expected the name of one folder, at most 100 characters and 200 bytes")
    return name


def export_images(run: Path) -> None:
    """Writes `images/` of the run's samples, unless it is there as a whole."""
    from dp_lora.models import sample

    samples = sample.load(run)
    folder, partial = run / IMAGES, run / f"{IMAGES}.partial"
    if len(list(folder.rglob("*.png"))) == len(samples.labels) and (folder / "metadata.jsonl").exists():
        return
    for place in (folder, partial):
        shutil.rmtree(place, ignore_errors=True)
    write_images(samples, partial)
    (partial / IMAGES).replace(folder)
    partial.rmdir()


def write_images(samples: Samples, folder: Path) -> None:
    """Writes `images/<class>/<number>.png`, and `images/metadata.jsonl` with each file's label.

    datasets' imagefolder, pytorch-fid and clean-fid read them.
    """
    from PIL import Image

    lines = []
    for number, (image, label) in enumerate(zip(samples.images, samples.labels, strict=True)):
        name = samples.classes[label]
        file = f"{_as_folder(name, int(label))}/{number:06}.png"
        buffer = io.BytesIO()
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, "PNG")
        path = folder / IMAGES / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
        lines.append(json.dumps({"file_name": file, "label": name}, ensure_ascii=False))
    write_atomic(folder / IMAGES / "metadata.jsonl", "\n".join(lines) + "\n")


def _as_folder(name: str, label: int) -> str:
    """The name of a class as that of a folder; its number where it cannot be one.

    >>> _as_folder("tabby cat", 3), _as_folder("../x", 4)
    ('tabby cat', 'class 4')
    """
    return name if re.fullmatch(r"(?!\.)[^/\\\0]{1,100}", name) else f"class {label}"
