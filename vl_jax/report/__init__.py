"""Pages: what a run, a sweep, a dataset or a routing looks like."""
