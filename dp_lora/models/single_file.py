"""One file with a whole pipeline, or its network alone, as a folder of diffusers: `dp-lora-import --config`.

The settings, the tokenizers and the parts that the file lacks come from a folder in diffusers form, such as a
copy of the published pipeline, with or without its large files. Nothing is fetched, and nothing pickled is
executed.
"""

from __future__ import annotations

import itertools
import logging as plain_logging
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open
from torch import nn

from dp_lora.errors import UserError
from dp_lora.models import compvis
from dp_lora.models.families import FAMILIES
from dp_lora.models.folders import load, sha256
from dp_lora.models.inert import stand_ins
from dp_lora.models.pipelines import is_pipeline, part_of_text, pipeline_name
from dp_lora.models.text_to_image import silent
from dp_lora.storage.files import read_json, write_json

_WEIGHTS = (".safetensors", ".bin")

_INSIDE = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
"""How the names of a part's tensors begin in files that hold it."""

_T5_INSIDE = ("text_encoders.t5xxl.",)


def single_file_pipelines() -> list[str]:
    """The pipelines that are known here and that diffusers reads from one file."""
    known = ("StableDiffusionPipeline", *FAMILIES)
    return [name for name in known if hasattr(getattr(diffusers, name), "from_single_file")]


def import_single_file(path: Path, config: Path, out: Path) -> None:
    """Writes the pipeline in the file `path` to the new folder `out`, whole or not at all.

    Args:
        path: as Stable Diffusion 1.x, 2.x, SDXL, SD 3 and FLUX are published in one file.
        config: a folder in diffusers form with the settings of the same pipeline. Weights in it are those of
            the parts that the file lacks: a part that the file holds is taken from the file.
        out: a new folder.

    Raises UserError where the file and the settings do not make a whole pipeline.
    """
    if not is_pipeline(config):
        raise UserError(
            f"--config={config}: expected a folder of the same pipeline in diffusers form (model_index.json, "
            "and folders with config.json and tokenizers; weights only of what the file lacks)"
        )
    name = pipeline_name(config)
    if name not in single_file_pipelines():
        raise UserError(
            f"--config={config}: is a {name}; expected one of {', '.join(single_file_pipelines())}"
        )
    pipe = _read(path, config, name)
    with compvis.written_whole(path, out) as partial:
        with silent():
            pipe.save_pretrained(partial)
        load(partial)
        record = {"made_by": "dp-lora-import", "checkpoint_sha256": sha256(path), "pipeline": name}
        write_json(partial / "record.json", record)


def _read(path: Path, config: Path, name: str) -> Any:
    """The pipeline of diffusers, with all of its weights."""
    given = _from_folder(config, _names(path))
    diffusers.utils.logging.disable_progress_bar()
    # Their converters warn of tensors that no part asks for.
    disabled = plain_logging.root.manager.disable
    plain_logging.disable(plain_logging.WARNING)
    try:
        with silent(), stand_ins():
            pipe = getattr(diffusers, name).from_single_file(
                str(path), config=str(config), local_files_only=True, **given
            )
    except Exception as error:  # a converter of its own for each part
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "meta tensor" in reason:
            reason = "tensors of one part are missing"
        raise UserError(
            f"{path}: cannot be read as a {name} ({reason}); expected its weights in one file, and in "
            f"{config} those of the parts that the file lacks"
        ) from error
    finally:
        plain_logging.disable(disabled)
    for part_name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            _refuse_incomplete(part, part_name, path, config)
    return pipe


def _names(path: Path) -> list[str]:
    """The names of the tensors in the file."""
    if path.suffix != ".safetensors":
        return list(compvis.read(path))
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({reason}); expected a pipeline in one file") from error


def _holds(names: list[str], part: str, kind: str) -> bool:
    """Whether some of the names are of tensors of the pipeline's `part`, which is a `kind`."""
    inside = _T5_INSIDE if kind.startswith("T5") else _INSIDE.get(part, ())
    return any(name.startswith(inside) for name in names) if inside else False


def _from_folder(config: Path, names: list[str]) -> dict[str, Any]:
    """The parts whose weights lie in the folder alone; None for those that the pipeline does not need.

    Args:
        config: the folder.
        names: of the tensors in the file.
    """
    given: dict[str, Any] = {}
    for name, entry in read_json(config / "model_index.json").items():
        if not isinstance(entry, list):
            continue
        library, kind = entry
        if library is None:
            given[name] = None
            continue
        if library not in ("diffusers", "transformers"):
            raise UserError(
                f"--config: {config / 'model_index.json'} has {entry} for {name}; expected those of "
                "diffusers and transformers, since no other code is run"
            )
        if _holds(names, name, kind):
            continue
        if library == "transformers" and _has_weights(config / name):
            given[name] = part_of_text(config / name, kind)
        elif library == "diffusers" and name == "vae" and _has_weights(config / name):
            given[name] = getattr(diffusers, kind).from_pretrained(config / name, local_files_only=True)
    return given | {name: None for name in ("safety_checker", "feature_extractor") if name in given}


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in _WEIGHTS for path in folder.glob("*"))


def _refuse_incomplete(part: nn.Module, name: str, path: Path, config: Path) -> None:
    values = itertools.chain(part.named_parameters(), part.named_buffers())
    if missing := [key for key, value in values if value.is_meta]:
        raise UserError(
            f"{path}: has {len(missing)} missing tensors of {name} ({', '.join(sorted(missing)[:4])}); "
            f"expected those that {config / name / 'config.json'} asks for"
        )
