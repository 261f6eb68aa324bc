"""Graphs of circuit-tracer beside ours, on random models that both read from the same files."""
