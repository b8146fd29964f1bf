"""Inputs that are neither pictures nor texts: waves, series, clips, volumes, depth and flow."""
