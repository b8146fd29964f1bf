"""Encoders of series: steps in time in, a token for one or more of them out."""
