"""Gemma 2 as a hooked model: the only package that imports TransformerLens's models."""
