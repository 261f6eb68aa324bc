"""The paper's metrics as functions and sums, and ``evaluate``, which measures SAEs on a model."""
