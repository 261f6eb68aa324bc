"""Interoperation with SAELens: its directory of releases, its training runners and class, and its ``run_evals``."""
