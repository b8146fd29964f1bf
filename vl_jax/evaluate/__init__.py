"""Evaluation: metrics on generated answers."""
