"""What each latent contributes to a metric of the logits, and to latents downstream."""
