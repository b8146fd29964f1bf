"""Stages that add experts, or train some of them alone."""
