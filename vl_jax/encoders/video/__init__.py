"""Encoders of clips and volumes: frames or slices in, tokens out."""
