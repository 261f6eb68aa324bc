"""Proof on the real weights: samples of released SAEs measured on their model, compared with what is known of them."""
