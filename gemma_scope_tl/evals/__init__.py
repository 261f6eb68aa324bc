"""The paper's metrics, and their evaluation on a model."""
