"""Pre-trained latent diffusion models, what is trained of them, and images from them."""
