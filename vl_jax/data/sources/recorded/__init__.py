"""Recordings in layouts of their own, which are no records that name files."""
