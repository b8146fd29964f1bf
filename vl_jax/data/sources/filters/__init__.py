"""Sources of which some samples are left out."""
