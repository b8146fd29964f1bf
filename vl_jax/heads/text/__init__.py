"""Heads that write."""
