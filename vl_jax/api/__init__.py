"""What the package offers to Python: an experiment, a run of it, and what to do with a run."""
