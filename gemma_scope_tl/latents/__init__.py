"""Which latents are active on which tokens, and which tokens a latent promotes."""
