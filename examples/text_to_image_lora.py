"""Private LoRA fine-tuning of a text-to-image pipeline in a training loop of its own.

    python examples/text_to_image_lora.py PIPELINE IMAGES OUT

PIPELINE is a folder or a name on the hub. IMAGES holds PNG files, each with its caption in a .txt file of the
same name. OUT gets the adapter and privacy.json. OUT/private holds the noise key and the checkpoint: keep it
private. Give the same command again to resume.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image

from dp_lora import PrivateTraining, make_plan


@torch.no_grad()
def encode(pipe, folder):
    """Mean and standard deviation of the images' latents, and their embedded captions."""
    paths, size = sorted(folder.glob("*.png")), pipe.unet.config.sample_size * pipe.vae_scale_factor
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in paths])
    posterior = pipe.vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    captions = [path.with_suffix(".txt").read_text().strip() for path in paths]
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    scale = pipe.vae.config.scaling_factor
    return posterior.mean * scale, posterior.std * scale, pipe.text_encoder(tokens.input_ids)[0]


def add_lora(pipe, rank=4):
    """Freezes the UNet and adds the adapter, which alone is trained."""
    pipe.unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def train(pipe, images, plan, out, learning_rate=1e-3, seed=None):
    """Trains the adapter on the encoded `images` as `plan` says and writes it to the folder `out`."""
    means, stds, texts = images
    k, shape = plan.noise_multiplicity, means.shape[1:]
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    times = schedule.config.num_train_timesteps

    def losses(latents, noise, timesteps, texts):  # [M, c, h, w], [M, k, c, h, w], [M, k], [M, tokens, d]
        noise, timesteps = noise.flatten(0, 1), timesteps.flatten()
        noisy = schedule.add_noise(latents.repeat_interleave(k, 0), noise, timesteps)
        predicted = pipe.unet(noisy, timesteps, encoder_hidden_states=texts.repeat_interleave(k, 0)).sample
        return (predicted - noise).square().unflatten(0, (-1, k)).flatten(1).mean(1)  # [M]

    sizes = (4, *shape), (4, k, *shape), (4, *texts.shape[1:])
    latents, noise, text = (torch.randn(size) for size in sizes)
    invented = latents, noise, torch.randint(times, (4, k)), text
    private = PrivateTraining(
        pipe.unet,
        torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=learning_rate),
        plan,
        folder=out / "private",
        synthetic_losses=lambda chosen: losses(*(part[chosen] for part in invented)),
        insecure_seed=seed,
    )
    for step in private.steps():
        for rows, weights, draws in step.microbatches(8):
            latents = means[rows] + stds[rows] * draws.normal("posterior", *shape)
            noise, timesteps = draws.normal("diffusion", k, *shape), draws.timesteps(k, times)
            step.add(losses(latents, noise, timesteps, texts[rows]), weights)
        if step.apply():
            print(f"step {step.number + 1} of {private.total}: epsilon {step.values['epsilon']:.3f}")
    pipe.unet.save_lora_adapter(out)
    private.statement().save(out / "privacy.json")


if __name__ == "__main__":
    pipeline, folder, out = sys.argv[1:]
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    images = encode(pipe, Path(folder))
    size = len(images[0])
    plan = make_plan(
        num_examples=size, expected_batch_size=size / 4, steps=20, target_epsilon=8.0, delta=0.1 / size,
        noise_multiplicity=4, max_grad_norm=1e-3,
    )  # fmt: skip
    add_lora(pipe)
    train(pipe, images, plan, Path(out))
