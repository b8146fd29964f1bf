"""Heads below the level of whole pictures and texts: tokens with words, regions with phrases."""
