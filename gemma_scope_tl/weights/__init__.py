"""Weights on disk or on the Hub, which are read without executing code and checked before use."""
