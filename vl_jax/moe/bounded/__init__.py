"""Experts and their exchange in bounded memory: rooms, windows of tokens, rounds between devices."""
