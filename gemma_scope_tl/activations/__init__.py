"""Activations of a hooked model at many sites: read in one forward pass, shuffled, stored."""
