"""Benchmarks: ours against a peer in one interleaved run, medians and ratios, the machine described."""
