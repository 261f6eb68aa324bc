"""Benchmarks, each of which runs this package and a named peer in one process and writes JSON to results/."""
