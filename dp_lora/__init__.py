"""Differentially private LoRA fine-tuning of latent diffusion models, as a Hydra-configured sweep framework."""

__version__ = "0.1.0"
