"""Files: reading parts of large ones, and remembering where the parts are."""
