"""The training loop, the private fine-tuning, and how they run on a machine."""
