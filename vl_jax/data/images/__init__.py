"""Pictures, and what is shown as one, to tiles."""
