"""Tasks: what a model is asked, one kind a file."""
