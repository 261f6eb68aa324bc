"""Training jobs on a Ray cluster."""
