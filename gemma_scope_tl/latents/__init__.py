"""Tables of the latents that are active on a text, and of the tokens that a latent promotes."""
