"""Benchmarks: our figure and the rival's, in one run."""
