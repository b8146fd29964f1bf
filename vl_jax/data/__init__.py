"""Data: sources, the procedural scenes, text and image encoding, and the training pipeline."""
