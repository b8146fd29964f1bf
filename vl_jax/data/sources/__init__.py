"""Sources: every format becomes a random-access sequence of samples."""
