"""Pictures drawn from a seed, with exact labels: textured scenes and circuit boards."""
