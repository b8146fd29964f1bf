"""Metrics: arrays in, a dictionary of numbers out, with the figure that guessing would reach."""
