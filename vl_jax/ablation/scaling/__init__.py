"""Scaling curves: losses of a grid of runs, and a law that is fitted to them with its uncertainty."""
