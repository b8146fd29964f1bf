"""Encoders of texts: BERT, Transformer-XL, and one whose positions are distances."""
