"""The language model: latent attention and the decoder."""
