"""Weights on disk or on the Hub: read without executing anything, and checked before use."""
