"""SAEs on a real language model: SmolLM2-135M's middle residual stream."""
