"""What exists for SAELens alone: its directory of releases, its training runners and class, its ``run_evals``."""
