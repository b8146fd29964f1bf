"""Training: the pure step, the optimiser, stages as data, and the loop."""
