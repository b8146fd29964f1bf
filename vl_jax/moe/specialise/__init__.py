"""Experts by domain: adding some, and which rows take which."""
