"""A diffusion model small enough to loop over its single examples."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import Tensor, nn

PRESETS: dict[str, list[str]] = {
    "lora": ["lora"],
    "lora_everywhere": ["lora", "lora_everywhere"],
    "lora_embedder": ["lora", "embedder"],
    "attention": ["attention"],
    "embedder": ["embedder"],
    "bias": ["bias"],
    "norm": ["norm"],
    "full": ["full"],
}


class TinyDiffusion(nn.Module):
    """A class-conditional UNet of some ten thousand parameters, with one loss per example."""

    def __init__(self, components: list[str], checkpointing: bool = False) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(4, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=4,
            attention_head_dim=2,
            norm_num_groups=2,
        )
        self.embedder = nn.Embedding(3, 4)
        self.requires_grad_(False)
        if "lora" in components:
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            if "lora_everywhere" in components:
                targets += ["conv1", "conv2", "proj_in", "proj_out", "time_emb_proj", "net.2"]
            config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights="gaussian")
            self.unet.add_adapter(config)
        for name, p in self.named_parameters():
            chosen = {
                "attention": ".attn" in name,
                "embedder": name.startswith("embedder"),
                "bias": name.endswith("bias"),
                "norm": "norm" in name,
                "full": True,
            }
            if any(chosen.get(component) for component in components):
                p.requires_grad_(True)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        for p in self.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)

    def losses(self, batch: tuple[Tensor, ...], k: int) -> Tensor:
        """[M]: the mean over an example's k draws of the mean squared error."""
        latents, labels, timesteps, noise = batch
        noisy = latents.repeat_interleave(k, 0) + noise
        condition = self.embedder(labels.repeat_interleave(k)).unsqueeze(1)
        out = self.unet(noisy, timesteps, encoder_hidden_states=condition, return_dict=False)[0]
        error = out.to(torch.promote_types(out.dtype, torch.float32)) - noise
        return error.square().flatten(1).mean(1).view(-1, k).mean(1)


def batch_of(examples: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(examples, 2, 4, 4, generator=generator, dtype=dtype),
        torch.randint(0, 3, (examples,), generator=generator),
        torch.randint(0, 1000, (examples * k,), generator=generator),
        torch.randn(examples * k, 2, 4, 4, generator=generator, dtype=dtype),
    )
