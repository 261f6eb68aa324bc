"""Training SAEs with the paper's recipe."""
