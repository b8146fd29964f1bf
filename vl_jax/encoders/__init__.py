"""Encoders: pixels (later sound, text, video) in, tokens out."""
