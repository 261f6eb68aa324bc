"""Attributions: the contribution of each latent to a metric of the logits, and to latents downstream."""
