"""Benchmarks: `colaserve bench ...`. Every claim is a ratio of things measured next to each other in one run."""
