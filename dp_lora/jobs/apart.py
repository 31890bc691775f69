"""Whether the public images of the pre-training are apart from the private ones, which it must not see.

What is pre-trained has no privacy, and whoever calls images public says so of the images that were named, not
of those that a folder holds by mistake.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dp_lora.config.load import read_config
from dp_lora.config.schema import Config
from dp_lora.data.digests import SEEN, SIZE, both
from dp_lora.data.pixels import shown
from dp_lora.data.sets import ImageSplits
from dp_lora.data.sources import location
from dp_lora.errors import PrivateRefusal, UserError
from dp_lora.jobs.image_index import plain
from dp_lora.storage.files import read_json

WAY_OUT = "pre-training has no privacy; expected other images, or data.public=true if anybody may see these"


def refuse_one_place(config: Config) -> None:
    """Raises UserError when private and public images are read from one place, or one inside of the other."""
    if config.data.public:
        return
    private, public = (location(data, config.paths) for data in (config.data, config.public_data))
    if private is None or public is None:
        return
    if private.is_relative_to(public) or public.is_relative_to(private):
        raise UserError(
            f"public_data.source with public_data={config.public_data.name}: names the place of the private "
            f"images (data.source), or one of the two lies in the other: {WAY_OUT}"
        )


def refuse_drawn(config: Config) -> None:
    """Raises UserError when the public images are what a run with private images has drawn or written.

    They carry what that run spent on its images, which the statement of the new run would not count.
    """
    place = location(config.public_data, config.paths)
    for folder in () if place is None else (place, *place.parents):
        drawn = (folder / "sampling.json").exists()
        run = folder if (folder / "privacy.json").exists() and (folder / "config.yaml").exists() else None
        if (drawn or run) and not (run and read_config(run / "config.yaml").data.public):
            raise UserError(
                f"public_data.source={config.public_data.source}: {shown(folder)} holds what a run with "
                "private images has drawn; pre-training on it would hide what that run spent. Expected other "
                "images; model.adapter=RUN goes on from its adapter, and counts it"
            )


def refuse_shared_images(config: Config, public: ImageSplits, private: ImageSplits) -> None:
    """Raises PrivateRefusal when a private image is among the public ones that are about to be trained on.

    As they were decoded, and as they are prepared for the model; images of one colour identify nobody. Two
    published sets are what they are, and are not compared.
    """
    rows = (row for part in public for row in both(part.images, part.digests))
    _refuse_known(config, {row.tobytes() for row in rows}, private, config.public_data.source)


def refuse_seen(config: Config, folder: Path, private: ImageSplits) -> None:
    """The same for a model that is there already, by the digests of the images that it was made from.

    Models of earlier versions, and those that were not made here, have no digests and are not compared.
    """
    path, record = folder / SEEN, folder / "record.json"
    found = read_json(record) if record.exists() else {}
    found = found if isinstance(found, dict) else {}
    if not path.exists():
        if found.get("digests") == SEEN:
            raise UserError(
                f"{path}: is missing, so the public images of this model cannot be told from the private "
                "ones; expected it as the pre-training left it"
            )
        return
    try:
        seen = np.load(path, allow_pickle=False)
        if seen.dtype != np.uint8 or seen.ndim != 2 or seen.shape[1] != SIZE or not len(seen):
            raise ValueError(f"{seen.dtype} {seen.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: is not what the pre-training left ({' '.join(str(error).split())[:80]}); put it back"
        ) from error
    public = found.get("public_data", {})
    _refuse_known(config, {row.tobytes() for row in seen}, private, public.get("source", "not known"))


def _refuse_known(config: Config, known: set[bytes], private: ImageSplits, source: str | None) -> None:
    """`source`: of the public images; None where they are a published set."""
    if config.data.public or (config.data.source is None and source is None):
        return
    shared = len(known & _digests(private))
    if shared:
        raise PrivateRefusal(
            f"public_data.source: {shared} of the private images are among the public ones: {WAY_OUT}"
        )


def _digests(images: ImageSplits) -> set[bytes]:
    """The digests of all images that show something, in all roles."""
    found: set[bytes] = set()
    for part in images:
        shows = ~plain(part.images)
        decoded = None if part.digests is None else part.digests[shows]
        found.update(row.tobytes() for row in both(part.images[shows], decoded))
    return found
