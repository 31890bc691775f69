"""Membership inference on a finished adapter: whether the loss of an image tells that it was trained on.

Members are private training images, the others come from the same set and were not trained on. Where it is
known whose the images are, members are persons, and a person's loss is the mean over their images.

Everything in here is a function of private images without noise: it is for the auditor, and releasing it is
not covered by epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_lora.auditing.bounds import Floats
from dp_lora.data.sets import ImageSet
from dp_lora.models.diffusion import in_batches, per_example_loss
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.models.latents import encode
from dp_lora.privacy.persons import Persons
from dp_lora.records.progress import Progress

ROWS = 512
"""Rows of one forward."""


@torch.inference_mode()
def losses(
    model: LatentDiffusion,
    latents: Tensor,
    labels: Tensor,
    *,
    draws: int,
    seed: int,
    progress: Progress | None = None,
) -> Floats:
    """[N]: the mean loss of each example over draws that are the same for all of them.

    Args:
        model: any, with no engine attached; left in evaluation mode.
        latents: [N, c, h, w].
        labels: [N].
        draws: number of (timestep, noise), spread evenly over the timesteps.
        seed: of the noise.
        progress: told the number of finished examples, and nothing else.
    """
    device = next(model.unet.parameters()).device
    total = model.process.num_timesteps
    timesteps = ((torch.arange(draws) + 0.5) / draws * total).long().to(device)
    noise = torch.randn(draws, *model.latent_shape, generator=torch.Generator().manual_seed(seed)).to(device)
    model.eval()
    found = []
    for batch in in_batches(len(latents), max(1, ROWS // draws)):
        part = slice(batch.start, batch.stop)
        size = len(batch)
        loss = per_example_loss(
            model,
            latents[part].to(device),
            labels[part].to(device),
            timesteps.expand(size, -1),
            noise.expand(size, *noise.shape),
        )
        found.append(loss.double().cpu())
        if progress is not None:
            progress.update(size)
    return np.asarray(torch.cat(found).numpy())


@dataclass(frozen=True, repr=False)
class Losses:
    """Losses of images, or of persons, before and after the fine-tuning, [N] each. Private as the images."""

    before: Floats
    after: Floats

    def scores(self, attack: str) -> Floats:
        """The scores of one of `ATTACKS`; higher says "member".

        `loss` is minus the loss (Yeom et al. 2018), `calibrated` what the fine-tuning took off it, so that
        easy images do not look like members (Watson et al. 2022).
        """
        return -self.after if attack == "loss" else self.before - self.after


ATTACKS = ("loss", "calibrated")


def losses_of(
    images: ImageSet,
    before: LatentDiffusion,
    after: LatentDiffusion,
    *,
    draws: int,
    seed: int,
    progress: Progress,
) -> Losses:
    """Losses of `images` under the model before and after its fine-tuning, at the mean of their latents.

    Of persons, where it is known whose the images are: the mean over all of a person's images.
    """
    latents, labels = encode(after, images).mean, torch.from_numpy(images.labels)
    found = [
        losses(model, latents, labels, draws=draws, seed=seed, progress=progress) for model in (before, after)
    ]
    if images.persons is not None:
        persons = Persons(images.persons)
        found = [persons.means(torch.from_numpy(one)).numpy() for one in found]
    return Losses(*found)


def examples(images: ImageSet) -> int:
    """The number of members that `images` can be: persons where they are known, else images."""
    return len(images) if images.persons is None else len(set(images.persons))


def draw(images: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` of the images without replacement, or all when there are no more; a public choice.

    Where it is known whose they are, all images of `count` persons.
    """
    if images.persons is not None:
        persons = Persons(images.persons)
        chosen = torch.randperm(len(persons), generator=torch.Generator().manual_seed(seed))[:count]
        return images.subset(np.sort(torch.cat([persons.records(int(i)) for i in chosen]).numpy()))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    return images.subset(np.sort(order[:count]))
