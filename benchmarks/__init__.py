"""Benchmarks: each runs a named peer beside ours in one process and writes JSON to results/."""
