"""Metrics of what is found in a picture: boxes, classes of pixels, depth. One metric a file."""
