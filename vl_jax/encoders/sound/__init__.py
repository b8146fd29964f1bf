"""Encoders of sounds: waves in, tokens in time out."""
