"""Model families: everything that differs from one family of models to the next, as data."""
