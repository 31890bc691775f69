"""What `dp-lora-neighbours` shows: for an auditor, the training images nearest to generated ones.

What it writes shows private images. It goes into the run's `checkpoint/`, which is never shared, or where the
auditor says, outside the run directory; nothing of it is logged or printed, and no epsilon covers it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dp_lora.config.load import read_config
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.storage.files import private_directory, write_atomic, write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

WARNING = "shows private training images: for an auditor's eyes, covered by no epsilon, never to be released"


class Nearest(NamedTuple):
    """Generated images beside training images."""

    distances: Tensor
    """float64 [N, k]: from each generated image to its nearest training images, nearest first."""
    indices: Tensor
    """int64 [N, k]: which ones."""


def nearest(features: Tensor, training: Tensor, count: int) -> Nearest:
    """The `count` training features [M, F] nearest to each of `features` [N, F]: Euclidean, in float64."""
    import torch

    found = []
    # Blocks bound the matrix of distances to some ten million numbers.
    for rows in torch.split(features.double(), max(1, 10**7 // len(training))):
        distances = torch.cdist(rows, training.double(), compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.topk(count, largest=False))
    return Nearest(torch.cat([one.values for one in found]), torch.cat([one.indices for one in found]))


def share_nearer(features: Tensor, training: Tensor, held_out: Tensor) -> float:
    """The share of generated images that are nearer to the training images than to as many held-out ones.

    One half is expected of a model that has memorised nothing; images as near to both count half.
    """
    n = min(len(training), len(held_out))
    own = nearest(features, training[:n], 1).distances[:, 0]
    other = nearest(features, held_out[:n], 1).distances[:, 0]
    return float(((own < other).double() + (own == other).double() / 2).mean())


def inspect(directory: Path, folder: Path, *, extractor: str, images: int, count: int) -> Path:
    """Writes `neighbours.png` and `neighbours.json` about a run into `folder` and returns the picture's path.

    Each row of the picture is a generated image, then its nearest training images; the rows are the
    `images` generated ones that lie nearest to the training set.

    Args:
        directory: a run directory with samples.npz.
        folder: made with mode 0700; the files get mode 0600.
        extractor: whose features the distances are of.
        images: rows of the picture.
        count: neighbours of each.

    Raises UserError: no such run, images that are no longer those of the run, or `folder` would be among what
    the run releases.
    """
    import numpy as np
    import torch

    from dp_lora.data import sets
    from dp_lora.jobs.job import check_content
    from dp_lora.models import sample

    config = _config(directory)
    _check_place(directory, folder)
    samples = sample.load(directory)
    splits = sets.load(config.data, config.paths)
    check_content(splits, directory)
    if splits.train.public:
        raise UserError("data.public=true: these images are public; expected a run on private ones")
    extract = _extraction(config, extractor)
    generated, training = extract(torch.from_numpy(samples.images)), extract(_tensor(splits.train.images))
    found = nearest(generated, training, min(count, len(training)))
    rows = found.distances[:, 0].argsort()[:images]
    sheet = np.concatenate(
        [samples.images[rows.numpy()][:, None], splits.train.images[found.indices[rows].numpy()]], axis=1
    )
    record: dict[str, Any] = {
        "note": WARNING,
        "extractor": extractor,
        "rows": [
            {
                "generated": int(i),
                "training": found.indices[i].tolist(),
                "distances": found.distances[i].tolist(),
            }
            for i in rows.tolist()
        ],
    }
    if len(splits.test):
        share = share_nearer(generated, _shuffled(training), _shuffled(extract(_tensor(splits.test.images))))
        record["nearer_to_training"] = {"share": share, "expected": 0.5}
    private_directory(folder)
    write_json(folder / "neighbours.json", record, mode=0o600)
    write_atomic(folder / "neighbours.png", _png(sheet), mode=0o600)
    return folder / "neighbours.png"


def _config(directory: Path) -> Config:
    path = directory / "config.yaml"
    if not path.is_file() or not (directory / "samples.npz").is_file():
        raise UserError(f"{directory}: expected a run directory with config.yaml and samples.npz")
    return read_config(path)


def _check_place(directory: Path, folder: Path) -> None:
    run, place = directory.resolve(), folder.resolve()
    if place.is_relative_to(run) and not place.is_relative_to(run / "checkpoint"):
        raise UserError(
            f"--out={folder}: lies among the files of the run that may be shared; expected a place outside "
            "the run directory, or in its checkpoint/"
        )
    if place.exists() and not place.is_relative_to(run) and any(place.iterdir()):
        raise UserError(f"--out={folder}: is not empty; expected a new folder")


def _extraction(config: Config, extractor: str) -> Any:
    """A function from images uint8 [N, C, H, W] to features."""
    from dataclasses import replace

    from dp_lora.evaluation.features import extract_features, load_extractors
    from dp_lora.jobs.device import device_of

    device = device_of(config)
    evaluation = replace(config.evaluation, extractors=[extractor])
    network = load_extractors(evaluation, device)[extractor].network

    def extract(images: Tensor) -> Tensor:
        return extract_features(network, images, batch_size=evaluation.batch_size, device=device)

    return extract


def _tensor(images: np.ndarray) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.require(images, requirements="W"))


def _shuffled(features: Tensor) -> Tensor:
    import torch

    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]


def _png(sheet: np.ndarray, scale: int = 2) -> bytes:
    """A picture of images uint8 [rows, columns, C, H, W]."""
    from PIL import Image

    rows, columns, channels, height, width = sheet.shape
    pixels = sheet.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
